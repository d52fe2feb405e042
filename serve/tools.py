"""Calls of tools: how a model's template writes them, read from its text as it comes. Imports neither ray nor torch."""

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .grammar import quoted, strict_json
from .messages import Tool

Notation = Literal["tagged", "bare"]
"""`tagged`: `<tool_call>{"name": …, "arguments": …}</tool_call>`, any number of them between words (Hermes, Qwen);
`bare`: the answer as a whole is `{"name": …, "parameters": …}` (Llama 3)."""

_BEGIN, _END = "<tool_call>", "</tool_call>"
_ARGUMENTS: dict[Notation, str] = {"tagged": "arguments", "bare": "parameters"}


@dataclass(frozen=True, slots=True)
class Call:
    """A function the model called; `arguments` is a text in JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


def notation_of(template: str) -> Notation | None:
    """How a chat template has the model call tools; none where it has no tools, or a form that is not known here."""
    if "tools" not in template:
        return None
    if _BEGIN in template and "<function=" not in template and "<arg_key>" not in template:
        return "tagged"
    if '"parameters"' in template and '{"name":' in template and _BEGIN not in template:
        return "bare"
    return None


def calls_grammar(tools: Sequence[Tool], notation: Notation) -> str:
    """A grammar of just one call of one of these functions, with arguments as its schema has them."""
    begin, end = (f"{_BEGIN}\n", f"\n{_END}") if notation == "tagged" else ("", "")
    rules = [f"start: {' | '.join(f'call{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        opening = f'{begin}{{"name": "{tool.function.name}", "{_ARGUMENTS[notation]}": '
        rules.append(f"call{i}: {quoted(opening)} arguments{i} {quoted('}' + end)}")
        rules.append(f"arguments{i}: %json {strict_json(tool.function.parameters)}")
    return "\n".join(rules)


class CallReader:
    """Splits one completion's text into words and calls; what looks like a call and is none of these functions stays
    text."""

    def __init__(self, notation: Notation, names: Collection[str]) -> None:
        self.called = False
        self._notation: Notation = notation
        self._names = names
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Add text; gives the words and calls that are now certain."""
        self._held += text
        if self._notation == "bare":
            return self._words_if_no_call()
        words, calls = [], []
        while (begin := self._held.find(_BEGIN)) >= 0 and (end := self._held.find(_END, begin)) >= 0:
            whole = self._held[begin : end + len(_END)]
            before, self._held = self._held[:begin], self._held[end + len(_END) :]
            if call := self._parse(whole[len(_BEGIN) : -len(_END)]):
                words.append(before.rstrip())
                calls.append(call)
            else:
                words.append(before + whole)
        keep = self._undecided()
        words.append(self._held[:keep])
        self._held = self._held[keep:]
        return "".join(words), calls

    def finish(self) -> tuple[str, list[Call]]:
        """No text follows; gives what was held back."""
        rest, self._held = self._held, ""
        if self._notation == "bare" and (call := self._parse(rest)):
            return "", [call]
        return ("" if self.called and not rest.strip() else rest), []

    def _undecided(self) -> int:
        """Where the text begins that may be a call, or the space before one."""
        begin = self._held.find(_BEGIN)
        if begin < 0:
            sizes = range(min(len(_BEGIN) - 1, len(self._held)), 0, -1)
            size = next((size for size in sizes if _BEGIN.startswith(self._held[-size:])), 0)
            begin = len(self._held) - size
        return len(self._held[:begin].rstrip())

    def _words_if_no_call(self) -> tuple[str, list[Call]]:
        start = self._held.lstrip()
        if not start or start.startswith("{"):
            return "", []
        words, self._held = self._held, ""
        return words, []

    def _parse(self, text: str) -> Call | None:
        try:
            said: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict):
            return None
        name, arguments = said.get("name"), said.get(_ARGUMENTS[self._notation])
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        self.called = True
        return Call(name, json.dumps(arguments, ensure_ascii=False))
