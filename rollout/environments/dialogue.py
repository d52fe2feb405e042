"""Between tokens and messages in an episode: what the policy said, and what it reads next.

Tokens that were drawn stay as they are: an observation's are appended to them, never a conversation tokenised anew.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...cluster.errors import InputError
from .protocol import Message

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
"""How Hermes and Qwen write a call: one JSON object with name and arguments."""


def with_response_template(tokenizer: Any) -> Any:
    """A tokenizer that reads its model's answers: by its own response template, or the one TRL knows for its chat
    template, where there is any."""
    if getattr(tokenizer, "response_template", None) is None:
        with suppress(ImportError, ValueError):
            from trl.chat_template_utils import add_response_schema

            return add_response_schema(tokenizer)
    return tokenizer


def reply(tokenizer: Any, text: str, prompt: str, tools: Sequence[Message] = ()) -> Message:
    """What the policy said as a message, with its tool calls. `prompt` is the text before, by which response templates
    see what the chat template wrote of the message itself."""
    if getattr(tokenizer, "response_template", None) is not None:
        with suppress(ValueError, KeyError, TypeError):  # what the policy wrote may be no message at all
            said = tokenizer.parse_response(text, prefix=prompt, tools=list(tools) or None)
            return {"role": "assistant", "content": "", **said}
    calls = [call for found in _CALL.findall(text) if (call := _call(found))]
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": _CALL.sub("", text).strip(), "tool_calls": calls}


def _call(text: str) -> Message | None:
    try:
        said = json.loads(text)
    except ValueError:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    return {"type": "function", "function": {"name": said["name"], "arguments": said.get("arguments", {})}}


def observation_ids(
    tokenizer: Any,
    said: Message,
    observation: Sequence[Message],
    stops: Sequence[int],
    tools: Sequence[Message] = (),
) -> list[int]:
    """The tokens between the stop token of the policy's message and its next: the observation by the chat template.

    They are what the template puts there after any user's message, so they do not depend on the conversation before.
    Raises `InputError` for a template that writes the policy's message another way once something follows it.
    """
    for message in (said, {"role": "assistant", "content": "x"}):
        asked = {"role": "user", "content": "x"}
        start = len(_ids(tokenizer, [asked], tools, go_on=True))
        before = _ids(tokenizer, [asked, message], tools, go_on=False)
        after = _ids(tokenizer, [asked, message, *observation], tools, go_on=True)
        ends = [i for i, token in enumerate(before) if i >= start and token in stops]
        if ends and after[: len(before)] == before:
            return after[ends[0] + 1 :]
    raise InputError(
        "the chat template does not keep the assistant's message as it was once an observation follows it, or ends it "
        "with no stop token: an episode of several turns cannot be trained on with it"
    )


def _ids(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], *, go_on: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=list(tools) or None,
            add_generation_prompt=go_on,
            sanitize_control_tokens=True,  # an observation may hold what looks like one
            return_dict=False,
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses an observation: {error}") from None
    return list(ids)
