"""Messages and tools of a row in one form, from OpenAI's and ShareGPT's.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`; an assistant's may have
`"tool_calls": [{"type": "function", "function": {"name": str, "arguments": {…}}}]`, and any may have `name`,
`tool_call_id` and `reasoning_content`, which chat templates read. A tool is
`{"type": "function", "function": {"name": str, …}}`. Imports neither ray nor torch.
"""

import json
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content")


class BadRow(Exception):
    """What is wrong with one row; the caller adds file and row number."""


def text_of(value: object, what: str) -> str:
    """Text. Raises `BadRow` for anything else."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text, not {type(value).__name__}")
    return value


def message(value: object, what: str) -> Message:
    """One message, of OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`) form."""
    if not isinstance(value, dict):
        raise BadRow(f"{what} must be an object with role and content, not {type(value).__name__}")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{what} has the role {role!r}: it must be one of {', '.join(ROLES)}")
    content = value.get("content", value.get("value"))
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(content, what)}
    calls = value.get("tool_calls")
    if calls and ROLES[role] != "assistant":
        raise BadRow(f"{what} has tool_calls, but the role {role}: only an assistant calls tools")
    read = {"role": ROLES[role], "content": _content(content, f"the content of {what}", empty=bool(calls))}
    read |= {key: text_of(value[key], f"{key} of {what}") for key in _KEPT if value.get(key) is not None}
    return read | ({"tool_calls": tool_calls(calls, what)} if calls else {})


def messages(value: object, what: str) -> list[Message]:
    """A list of messages."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} must be a list of messages, not {'empty' if value == [] else type(value).__name__}")
    return [message(m, f"{what}[{i}]") for i, m in enumerate(value)]


def turns(value: object, what: str, role: str) -> list[Message]:
    """Text (one message of that role), one message, or several."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [message(value, what)] if isinstance(value, dict) else messages(value, what)


def tool_calls(value: object, what: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects; JSON text is read, one call counts as a list of one."""
    given = parsed(value, f"the tool call of {what}")
    return [_call(call, what) for call in (given if isinstance(given, list) else [given])]


def tools(value: object) -> list[dict[str, Any]]:
    """The tools a conversation may call; JSON text is read. No tools are an empty list."""
    given = parsed(value, "tools") if value not in (None, "") else []
    if not isinstance(given, list):
        raise BadRow(f"tools must be a list, not {type(given).__name__}")
    return [{"type": "function", "function": _named(tool, f"tools[{i}]")} for i, tool in enumerate(given)]


def parsed(value: object, what: str) -> Any:
    """A value, or what its JSON text says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what} is not JSON: {error.msg} at column {error.colno}") from None


def _call(value: object, what: str) -> dict[str, Any]:
    function = _named(value, f"a tool call of {what}")
    arguments = parsed(function.get("arguments", {}), f"the arguments of {function['name']} in {what}")
    if not isinstance(arguments, dict):
        raise BadRow(f"the arguments of {function['name']} in {what} must be an object, not {type(arguments).__name__}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    number = value.get("id") if isinstance(value, dict) else None
    return {**call, "id": number} if number else call


def _named(value: object, what: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{what} must be an object with the function's name, not {str(value)[:60]!r}")
    return function


def _content(value: object, what: str, *, empty: bool) -> str:
    """Text; of a list of parts their text, one after the other."""
    if value is None and empty:
        return ""
    if not isinstance(value, list):
        return text_of(value, what)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow(f"{what} has a part of type {kind!r}: only text can be trained on")
    return "".join(text_of(part.get("text"), what) for part in value)
