"""Rows of a data file in the one form each kind of training reads.

    text        {"text": str}                                       cpt
    messages    {"messages": [message, …], "tools": [tool, …]}      sft, distill; tools where the row has them
    preference  {"prompt": [message, …], "chosen": […], "rejected": […]}   dpo, orpo, simpo, reward_model
    unpaired    {"prompt": [message, …], "completion": [message], "label": bool}   kto
    stepwise    {"prompt": [message, …], "completions": [str, …], "labels": [bool, …]}   process_reward_model
    prompt      {"prompt": [message, …], **the file's other columns}       grpo, evaluation
    demonstration   the same with "completion": [message]                  spin, from files of messages

Messages and tools are those of `messages.py`. Imports neither ray nor torch.
Every error is an `InputError` that names the file, the row (counted from 1) and the mend.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...cluster.errors import InputError
from ..stages import DataConfig, OnlineStage, SourceConfig, SplitConfig, StageConfig
from .files import Place, Row, names, read
from .messages import BadRow, Message, messages, parsed, text_of, tools, turns
from .split import on_side

Kind = Literal["text", "messages", "preference", "unpaired", "stepwise", "prompt", "demonstration"]

_KIND_OF_FORMAT: dict[str, Kind] = {
    "text": "text",
    "messages": "messages",
    "prompt_completion": "messages",
    "alpaca": "messages",
    "preference": "preference",
    "unpaired": "unpaired",
    "stepwise": "stepwise",
    "prompt": "prompt",
}
_KIND_OF_STAGE: dict[str, Kind] = {
    "cpt": "text",
    "sft": "messages",
    "distill": "messages",
    "dpo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "unpaired",
    "reward_model": "preference",
    "process_reward_model": "stepwise",
}
_NEEDS = {
    "text": "a `text` column",
    "messages": "`messages` (or `conversations`, `instruction` and `output`, `prompt` and `completion`)",
    "preference": "`chosen` and `rejected` (with `prompt` or `conversations`)",
    "unpaired": "`label` beside `messages`, or beside `prompt` and `completion`",
    "stepwise": "`prompt`, `completions` and `labels`",
    "prompt": "a `prompt` column",
}


_CANDIDATES = (
    ("unpaired", {"messages", "label"}),
    ("unpaired", {"prompt", "completion", "label"}),
    ("stepwise", {"prompt", "completions", "labels"}),
    ("preference", {"chosen", "rejected"}),
    ("messages", {"messages"}),
    ("messages", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("text", {"text"}),
    ("prompt", {"prompt"}),
)
"""Formats by the columns they need; what needs more stands first."""


def kind_of_stage(stage: StageConfig) -> Kind:
    """The kind of rows a stage trains on."""
    if isinstance(stage, OnlineStage):
        return "demonstration" if stage.demonstrations else "prompt"
    return _KIND_OF_STAGE[stage.type]


def load_rows(config: DataConfig, path: Path, kind: Kind | None = None) -> list[Row]:
    """The rows of a file, or of a folder of files, as one kind; see `read_rows`."""
    return read_rows(config, path, kind).rows


@dataclass(frozen=True, slots=True)
class Read:
    """Rows of one kind, the format they had, and how many there were on both sides of a split."""

    rows: list[Row]
    places: list[Place]
    format: str
    found: int


def read_rows(config: SourceConfig, path: Path, kind: Kind | None = None, split: SplitConfig | None = None) -> Read:
    """Read a file or folder into rows of one kind.

    `kind` is what the stage needs: it settles what `format: auto` looks for, and a file of another kind is refused.
    """
    given = list(islice(read(path), config.limit))
    if not given:
        raise InputError(f"{path} has no rows: an empty data set trains nothing")
    rows = [(place, _rename(row, config.columns, place)) for place, row in given if not split or on_side(row, split)]
    needed: Kind | None = "messages" if kind == "demonstration" else kind
    form = (
        _detect(_rename(given[0][1], config.columns, given[0][0]), given[0][0], needed)
        if config.format == "auto"
        else config.format
    )
    found = _KIND_OF_FORMAT[form]
    if needed and found != needed:
        need = _NEEDS[needed]
        raise InputError(f"{path} holds rows of format {form}, but this needs {need}: map them with `columns:`")
    convert = partial(_demonstration, _CONVERT[form]) if kind == "demonstration" else _CONVERT[form]
    canonical = [_convert_row(convert, row, config.system, place, form) for place, row in rows]
    return Read(canonical, [place for place, _ in rows], form, len(given))


# ---- columns


def _rename(row: Row, columns: dict[str, str], place: Place) -> Row:
    """Give the file's columns the names this toolkit knows."""
    if not columns:
        return row
    renamed = dict(row)
    for known, own in columns.items():
        if own not in row:
            near = difflib.get_close_matches(own, row, n=1)
            mend = f"did you mean {near[0]}?" if near else "mend `columns:`"
            raise InputError(f"{place}: no column {own!r} (there are {names(row)}): {mend}")
        renamed.pop(own, None)
        renamed[known] = row[own]
    return renamed


def _detect(row: Row, place: Place, kind: Kind | None) -> str:
    """The format of a file by the columns of its first row."""
    have = set(row)
    if kind == "prompt" and "prompt" in have:
        return "prompt"
    fitting = _fitting(row)
    wanted = [form for form in fitting if _KIND_OF_FORMAT[form] == kind]
    if wanted or (fitting and kind is None):
        return (wanted or fitting)[0]
    need = _NEEDS[kind] if kind else "columns it knows"
    mend = f"columns: {{{'prompt' if kind == 'prompt' else 'text'}: <column>}}"
    raise InputError(f"{place}: needs {need}; there are {names(have)}: map them, as in `{mend}`")


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"no column {name!r} (there are {names(row)}): map it, as in `columns: {{{name}: <column>}}`")
    return row[name]


def _fitting(row: Row) -> list[str]:
    return [form for form, columns in _CANDIDATES if columns <= set(row)]


def _convert_row(convert: Callable[[Row], Row], row: Row, system: str | None, place: Place, form: str) -> Row:
    try:
        canonical = convert(row)
    except BadRow as error:
        other = _fitting(row)
        if other and form not in other:
            raise InputError(
                f"{place}: has the columns of {other[0]}, but this file is {form}: a file has one"
            ) from None
        raise InputError(f"{place}: {error}") from None
    return _with_system(canonical, system) if system else canonical


def _with_system(row: Row, system: str) -> Row:
    """Put a system message before the conversation that has none."""
    name = "messages" if "messages" in row else "prompt"
    said = row.get(name)
    if not said or said[0]["role"] == "system":
        return row
    return row | {name: [{"role": "system", "content": system}, *said]}


# ---- formats


def _demonstration(convert: Callable[[Row], Row], row: Row) -> Row:
    """A conversation as a prompt and the assistant's message that ends it."""
    *prompt, last = convert(row)["messages"]
    if last["role"] != "assistant":
        raise BadRow(f"the conversation ends with a message of {last['role']}: there is no answer to learn")
    if not prompt:
        raise BadRow("the conversation is one message: there is no prompt that it answers")
    return row | {"prompt": prompt, "completion": [last]}


def _text(row: Row) -> Row:
    return {"text": text_of(_column(row, "text"), "text")}


def _conversation(row: Row) -> Row:
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    said = messages(parsed(_column(row, name), name), name)
    if row.get("system") and said[0]["role"] != "system":
        said.insert(0, {"role": "system", "content": text_of(row["system"], "system")})
    callable_tools = tools(row.get("tools"))
    return {"messages": said, "tools": callable_tools} if callable_tools else {"messages": said}


def _alpaca(row: Row) -> Row:
    parts = [text_of(_column(row, "instruction"), "instruction"), text_of(row.get("input") or "", "input")]
    answer = text_of(_column(row, "output"), "output")
    return _conversation(
        {
            "messages": [
                {"role": "user", "content": "\n".join(p for p in parts if p)},
                {"role": "assistant", "content": answer},
            ],
            "system": row.get("system"),
        }
    )


def _prompt_completion(row: Row) -> Row:
    prompt = turns(_column(row, "prompt"), "prompt", "user")
    return {"messages": prompt + turns(_column(row, "completion"), "completion", "assistant")}


def _preference(row: Row) -> Row:
    chosen = turns(_column(row, "chosen"), "chosen", "assistant")
    rejected = turns(_column(row, "rejected"), "rejected", "assistant")
    if "prompt" in row:
        prompt = turns(row["prompt"], "prompt", "user")
    elif "conversations" in row:
        prompt = messages(row["conversations"], "conversations")
    else:
        shared = sum(1 for _ in _common(chosen, rejected))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadRow("no prompt: add a `prompt` or `conversations` column, or begin chosen and rejected with it")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [m["role"] for m in answer] != ["assistant"]:
            raise BadRow(f"{name} must end the conversation with one assistant message, not {len(answer)} messages")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _unpaired(row: Row) -> Row:
    label = _column(row, "label")
    label = {"true": True, "false": False}.get(label.lower(), label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        raise BadRow(f"label is {label!r}: it must be true (wanted) or false")
    convert = _prompt_completion if "prompt" in row and "completion" in row else _conversation
    return _demonstration(convert, row) | {"label": label}


def _stepwise(row: Row) -> Row:
    steps, labels = (parsed(_column(row, name), name) for name in ("completions", "labels"))
    if not (isinstance(steps, list) and steps and all(isinstance(step, str) and step.strip() for step in steps)):
        raise BadRow("completions must be a list of texts, a step each, none of them empty")
    if not (isinstance(labels, list) and all(isinstance(label, bool) for label in labels)):
        raise BadRow("labels must be a list of true and false")
    if len(labels) != len(steps):
        raise BadRow(f"{len(steps)} steps and {len(labels)} labels: every step needs one")
    return {"prompt": turns(_column(row, "prompt"), "prompt", "user"), "completions": steps, "labels": labels}


def _common(a: list[Message], b: list[Message]) -> Iterator[Message]:
    """The messages both begin with, the answer at the end left out."""
    for x, y in zip(a[:-1], b[:-1], strict=False):
        if x != y:
            return
        yield x


def _prompt(row: Row) -> Row:
    return row | {"prompt": turns(_column(row, "prompt"), "prompt", "user")}


_CONVERT: dict[str, Callable[[Row], Row]] = {
    "text": _text,
    "messages": _conversation,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired": _unpaired,
    "stepwise": _stepwise,
    "prompt": _prompt,
}
