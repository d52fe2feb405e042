"""What a folder must be to reward a policy with: proven from its files, before any actor starts.

A model that reads other tokens than the policy writes gives numbers that look like rewards, and a run would follow
them.
"""

import json
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError

_PROBE = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


def check_reward_model(folder: Path, policy: Path, tokenizer: Any, where: str) -> None:
    """Raise `InputError` where a folder holds no reward model for a policy, with the key `where` of the recipe.

    It must be a sequence-classification model with one label in safetensors, with the policy's vocabulary and chat
    form. `policy` is the policy's folder, `tokenizer` its tokenizer.
    """
    if not folder.is_dir():
        raise InputError(f"{where}: no model folder at {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {folder} is not a model folder: its config.json cannot be read: {error}") from None
    _check_head(folder, config, where)
    size, needed = (_of_text(c).get("vocab_size") for c in (config, json.loads((policy / "config.json").read_text())))
    if size and needed and size < needed:
        raise InputError(f"{where}: {folder} knows {size} tokens and the policy has {needed}: {_MEND}")
    _check_tokenizer(folder, tokenizer, where)


def check_same_body(folder: Path, policy: Path, where: str) -> None:
    """Raise `InputError` where a reward model's layers are others than the policy's, for which memory is planned."""
    theirs, ours = (_of_text(json.loads((f / "config.json").read_text())) for f in (folder, policy))
    for key in ("model_type", "num_hidden_layers", "hidden_size"):
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{where}: {folder} has {key} {theirs.get(key)} and the policy {ours.get(key)}: a critic starts from a "
                "reward model of the policy's size; take one, or leave it out"
            )


_MEND = "take a reward model trained on the policy's tokenizer, such as a reward_model stage makes"


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of text; that of a model of images too has it one level down."""
    return config.get("text_config") or config


def _check_head(folder: Path, config: dict[str, Any], where: str) -> None:
    kinds = config.get("architectures") or ["a model without architectures"]
    if not kinds[0].endswith("ForSequenceClassification"):
        raise InputError(f"{where}: {folder} is {kinds[0]}, not a model for sequence classification: {_MEND}")
    labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers writes them unless they are its two
    if labels != 1:
        raise InputError(f"{where}: {folder} has {labels} labels, and a reward is one number: take one with one label")
    if _of_text(config).get("pad_token_id") is None:
        raise InputError(f"{where}: {folder} has no pad_token_id in its config.json: write the tokenizer's there")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{where}: {folder} has no *.safetensors: save the model there with save_pretrained")


def _check_tokenizer(folder: Path, tokenizer: Any, where: str) -> None:
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{where}: {folder} has no tokenizer: {str(error).splitlines()[0]}: {_MEND}") from None
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if other.get(token) != number:
            raise InputError(
                f"{where}: {folder} has another tokenizer than the policy: token {token!r} is {number} there and "
                f"{other.get(token, 'nothing')} in it: {_MEND}"
            )
    _check_form(folder, tokenizer, theirs, where)


def _check_form(folder: Path, ours: Any, theirs: Any, where: str) -> None:
    """Both write a conversation alike; a tokenizer without a chat template has no other form."""
    if not theirs.chat_template:
        return
    mine, other = (t.apply_chat_template(_PROBE, tokenize=False) for t in (ours, theirs))
    if mine != other:
        raise InputError(
            f"{where}: {folder} was trained on another chat form than the policy's: {other!r:.80} where the policy has "
            f"{mine!r:.80}: {_MEND}"
        )
