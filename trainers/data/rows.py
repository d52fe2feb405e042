"""Rows of a data file in the one form each kind of training reads.

    text        {"text": str}                                       cpt
    messages    {"messages": [message, …]}                          sft, distill
    preference  {"prompt": [message, …], "chosen": […], "rejected": […]}   dpo, orpo, simpo, reward_model
    unpaired    {"prompt": [message, …], "completion": [message], "label": bool}   kto
    stepwise    {"prompt": [message, …], "completions": [str, …], "labels": [bool, …]}   process_reward_model
    prompt      {"prompt": [message, …], **the file's other columns}       grpo, evaluation
    demonstration   the same with "completion": [message]                  spin, from files of messages

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. Imports neither ray nor torch.
Every error is an `InputError` that names the file, the row (counted from 1) and the mend.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...cluster.errors import InputError
from ..stages import DataConfig, OnlineStage, StageConfig

Row = dict[str, Any]
Message = dict[str, str]
Kind = Literal["text", "messages", "preference", "unpaired", "stepwise", "prompt", "demonstration"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
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


def kind_of_stage(stage: StageConfig) -> Kind:
    """The kind of rows a stage trains on."""
    if isinstance(stage, OnlineStage):
        return "demonstration" if stage.demonstrations else "prompt"
    return _KIND_OF_STAGE[stage.type]


def load_rows(config: DataConfig, path: Path, kind: Kind | None = None) -> list[Row]:
    """Read a JSONL, JSON, Parquet or text file into rows of one kind.

    `kind` is what the stage needs: it settles what `format: auto` looks for, and a file of another kind is refused.
    """
    try:
        rows = list(islice(_read(path), config.limit))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise InputError(f"{path} has no rows: an empty data set trains nothing")
    rows = [_rename(row, config.columns, path, n) for n, row in enumerate(rows, 1)]
    needed: Kind | None = "messages" if kind == "demonstration" else kind
    form = _detect(rows[0], path, needed) if config.format == "auto" else config.format
    found = _KIND_OF_FORMAT[form]
    if needed and found != needed:
        need = _NEEDS[needed]
        raise InputError(f"{path} holds rows of format {form}, but this needs {need}: map them with `columns:`")
    convert = partial(_demonstration, _CONVERT[form]) if kind == "demonstration" else _CONVERT[form]
    return [_convert_row(convert, row, config.system, path, n) for n, row in enumerate(rows, 1)]


# ---- files


def _read(path: Path) -> Iterator[Row]:
    """The rows as the file has them."""
    if not path.is_file():
        raise InputError(_missing(path))
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix == ".json":
        return _json(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".txt":
        return ({"text": line.rstrip("\n")} for line in path.open(encoding="utf-8") if line.strip())
    raise InputError(f"{path}: cannot read {suffix or 'a file without suffix'}: give .jsonl, .json, .parquet or .txt")


def _missing(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if path.is_dir():
        return f"{path} is a folder: `data.path` needs a file"
    if near:
        return f"no data file {path}: did you mean {near[0]}?"
    return f"no data file {path}: " + (
        f"its folder has {_names(names)}" if names else "its folder is not there or empty"
    )


def _names(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}") from None
            yield _object(row, path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = ": one object a line is JSONL, name it .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}{hint}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} holds one {type(rows).__name__}: a data file is a list of objects")
    return (_object(row, path, f"row {n}") for n, row in enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from None
    return (row for batch in file.iter_batches() for row in batch.to_pylist())


def _object(row: object, path: Path, place: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {place}: a row is an object with columns, not {type(row).__name__}")
    return row


# ---- columns


def _rename(row: Row, columns: dict[str, str], path: Path, number: int) -> Row:
    """Give the file's columns the names this toolkit knows."""
    if not columns:
        return row
    renamed = dict(row)
    for known, own in columns.items():
        if own not in row:
            near = difflib.get_close_matches(own, row, n=1)
            mend = f"did you mean {near[0]}?" if near else "mend `columns:`"
            raise InputError(f"{path}, row {number}: no column {own!r} (there are {_names(row)}): {mend}")
        renamed.pop(own, None)
        renamed[known] = row[own]
    return renamed


def _detect(row: Row, path: Path, kind: Kind | None) -> str:
    """The format of a file by the columns of its first row."""
    have = set(row)
    if kind == "prompt" and "prompt" in have:
        return "prompt"
    candidates = (
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
    fitting = [form for form, columns in candidates if columns <= have]
    wanted = [form for form in fitting if _KIND_OF_FORMAT[form] == kind]
    if wanted or (fitting and kind is None):
        return (wanted or fitting)[0]
    need = _NEEDS[kind] if kind else "columns it knows"
    mend = f"columns: {{{'prompt' if kind == 'prompt' else 'text'}: <column>}}"
    raise InputError(f"{path}, row 1: needs {need}; there are {_names(have)}: map them, as in `{mend}`")


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise _Bad(f"no column {name!r} (there are {_names(row)}): map it, as in `columns: {{{name}: <column>}}`")
    return row[name]


class _Bad(Exception):
    """What is wrong with one row; the caller adds file and row number."""


def _convert_row(convert: Callable[[Row], Row], row: Row, system: str | None, path: Path, number: int) -> Row:
    try:
        canonical = convert(row)
    except _Bad as error:
        raise InputError(f"{path}, row {number}: {error}") from None
    return _with_system(canonical, system) if system else canonical


def _with_system(row: Row, system: str) -> Row:
    """Put a system message before the conversation that has none."""
    name = "messages" if "messages" in row else "prompt"
    messages = row.get(name)
    if not messages or messages[0]["role"] == "system":
        return row
    return row | {name: [{"role": "system", "content": system}, *messages]}


# ---- formats


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{what} must be text, not {type(value).__name__}")
    return value


def _message(value: object, what: str) -> Message:
    """One message, of OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`) form."""
    if not isinstance(value, dict):
        raise _Bad(f"{what} must be an object with role and content, not {type(value).__name__}")
    if value.get("tool_calls"):
        raise _Bad(f"{what} has tool_calls, which this reader would lose: write the call as text in its content")
    role = value.get("role", value.get("from"))
    if role not in ROLES:
        raise _Bad(f"{what} has the role {role!r}: it must be one of {', '.join(ROLES)}")
    content = value.get("content", value.get("value"))
    return {"role": ROLES[role], "content": _string(content, f"the content of {what}")}


def _messages(value: object, what: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Bad(f"{what} must be a list of messages, not {'empty' if value == [] else type(value).__name__}")
    return [_message(m, f"{what}[{i}]") for i, m in enumerate(value)]


def _turns(value: object, what: str, role: str) -> list[Message]:
    """Text (one message of that role), one message, or several."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [_message(value, what)] if isinstance(value, dict) else _messages(value, what)


def _demonstration(convert: Callable[[Row], Row], row: Row) -> Row:
    """A conversation as a prompt and the assistant's message that ends it."""
    *prompt, last = convert(row)["messages"]
    if last["role"] != "assistant":
        raise _Bad(f"the conversation ends with a message of {last['role']}: there is no answer to learn")
    if not prompt:
        raise _Bad("the conversation is one message: there is no prompt that it answers")
    return row | {"prompt": prompt, "completion": [last]}


def _text(row: Row) -> Row:
    return {"text": _string(_column(row, "text"), "text")}


def _conversation(row: Row) -> Row:
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    messages = _messages(_column(row, name), name)
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(row["system"], "system")})
    return {"messages": messages}


def _alpaca(row: Row) -> Row:
    parts = [_string(_column(row, "instruction"), "instruction"), _string(row.get("input") or "", "input")]
    answer = _string(_column(row, "output"), "output")
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
    prompt = _turns(_column(row, "prompt"), "prompt", "user")
    return {"messages": prompt + _turns(_column(row, "completion"), "completion", "assistant")}


def _preference(row: Row) -> Row:
    chosen = _turns(_column(row, "chosen"), "chosen", "assistant")
    rejected = _turns(_column(row, "rejected"), "rejected", "assistant")
    if "prompt" in row:
        prompt = _turns(row["prompt"], "prompt", "user")
    elif "conversations" in row:
        prompt = _messages(row["conversations"], "conversations")
    else:
        shared = sum(1 for _ in _common(chosen, rejected))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise _Bad("no prompt: add a `prompt` or `conversations` column, or begin chosen and rejected with it")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [m["role"] for m in answer] != ["assistant"]:
            raise _Bad(f"{name} must end the conversation with one assistant message, not {len(answer)} messages")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _unpaired(row: Row) -> Row:
    label = _column(row, "label")
    if not isinstance(label, bool):
        raise _Bad(f"label is {label!r}: it must be true (wanted) or false")
    convert = _prompt_completion if "prompt" in row and "completion" in row else _conversation
    return _demonstration(convert, row) | {"label": label}


def _stepwise(row: Row) -> Row:
    steps, labels = _column(row, "completions"), _column(row, "labels")
    if not (isinstance(steps, list) and steps and all(isinstance(step, str) and step.strip() for step in steps)):
        raise _Bad("completions must be a list of texts, a step each, none of them empty")
    if not (isinstance(labels, list) and all(isinstance(label, bool) for label in labels)):
        raise _Bad("labels must be a list of true and false")
    if len(labels) != len(steps):
        raise _Bad(f"{len(steps)} steps and {len(labels)} labels: every step needs one")
    return {"prompt": _turns(_column(row, "prompt"), "prompt", "user"), "completions": steps, "labels": labels}


def _common(a: list[Message], b: list[Message]) -> Iterator[Message]:
    """The messages both begin with, the answer at the end left out."""
    for x, y in zip(a[:-1], b[:-1], strict=False):
        if x != y:
            return
        yield x


def _prompt(row: Row) -> Row:
    return row | {"prompt": _turns(_column(row, "prompt"), "prompt", "user")}


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
