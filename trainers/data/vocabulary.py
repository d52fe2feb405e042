"""Whether a tokenizer and its chat template are the model's own. Imports neither ray nor torch."""

import json
import re
from pathlib import Path

from ...cluster.errors import InputError
from .template import Tokenizer

_CONTROL = re.compile(r"<\|[^|<>{}\s]+\|>")


def check_vocabulary(tokenizer: Tokenizer, model: Path) -> None:
    """Refuse a tokenizer that has tokens the model has no embedding for, and a template that writes control tokens
    which the tokenizer takes for plain text. Raises `InputError`."""
    config = json.loads((model / "config.json").read_text())
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    highest = max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        raise InputError(
            f"{model}: the tokenizer's highest token is {highest}, but the model has embeddings for {rows} tokens "
            "(vocab_size in config.json): put the model's own tokenizer there, or resize the model's embeddings"
        )
    known = tokenizer.get_vocab()
    written = dict.fromkeys(_CONTROL.findall(tokenizer.chat_template or ""))
    foreign = [token for token in written if token not in known]
    if foreign:
        raise InputError(
            f"{model}: the chat template writes {foreign[0]!r}, which is no token of its tokenizer: the template is "
            "another model's; put the model's own chat_template.jinja there, or add the token"
        )
