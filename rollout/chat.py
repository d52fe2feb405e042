"""From messages to the tokens a model generates after, and the tokens that end an answer: one way, for rollouts,
training data and serving.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..cluster.errors import InputError


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer here."""

    name_or_path: str
    eos_token_id: int | None
    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


def encode_prompt(
    tokenizer: ChatTokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """The tokens to generate after; control tokens written in a message or a tool are read as plain text.

    `tools` are the JSON schemas of what the model may call. Raises `InputError` where there is no chat template, or it
    refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError("the model has no chat template")
    try:
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=list(tools) or None,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, LookupError) as error:
        raise InputError(f"the chat template refuses these messages: {error}") from None
    return list(ids)


def stop_tokens(tokenizer: ChatTokenizer) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's end token and those of the model's generation_config.json."""
    ids = [tokenizer.eos_token_id]
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    if path.is_file():
        more = json.loads(path.read_text()).get("eos_token_id")
        ids += more if isinstance(more, list) else [more]
    return frozenset(i for i in ids if i is not None)
