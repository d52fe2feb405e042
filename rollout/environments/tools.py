"""The environment that calls plain Python functions for the policy, and is over when it calls none."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ...cluster.errors import InputError
from .protocol import Message, Turn


class ToolEnvironment:
    """Answers each of the policy's tool calls with what the function gives; an error is an answer, too."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Raises `InputError` for a function whose docstring and annotations do not describe it."""
        self._functions = {function.__name__: function for function in functions}
        self.tools: Sequence[Message] = [_schema(function) for function in functions]

    def step(self, messages: Sequence[Message], row: dict[str, Any]) -> Turn:
        """One `tool` message for each call of the last message, in order; without calls the episode is over."""
        asked = messages[-1].get("tool_calls") or []
        if not asked:
            return Turn(done=True)
        return Turn([self._answer(call) for call in asked], done=False)

    def _answer(self, call: Message) -> Message:
        called = call.get("function", call)
        name = str(called.get("name"))
        known = {"role": "tool", "name": name} | ({"tool_call_id": call["id"]} if "id" in call else {})
        return known | {"content": self._call(name, called.get("arguments"))}

    def _call(self, name: str, arguments: Any) -> str:
        if name not in self._functions:
            return f"error: there is no tool {name!r:.60}, only {', '.join(self._functions)}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            return "error: arguments are no JSON object"
        try:
            given = self._functions[name](**arguments)
        except Exception as error:  # noqa: BLE001  (the policy's arguments, the user's function: it reads what was wrong)
            return f"error: {type(error).__name__}: {error}"[:1000]
        return given if isinstance(given, str) else json.dumps(given, default=str)


def _schema(function: Callable[..., Any]) -> Message:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # DocstringParsingException and TypeHintParsingException have no base of their own
        raise InputError(
            f"environment function {function.__name__!r} cannot be described to a model: {error}; give it annotations "
            "and a docstring with an Args section"
        ) from error
