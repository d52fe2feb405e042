"""A conversation, its tools and its answer's form as OpenAI's API has them. Imports neither ray nor torch.

A field that is not here is refused with its name, never ignored: an answer that left out half of what was asked looks
right and is wrong. A field that is null counts as not given.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class Strict(BaseModel):
    """Base of all that a request holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(Strict):
    """A piece of a message's content; only text."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


def text_of(content: Content) -> str:
    """A message's content as one string."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class CalledFunction(Strict):
    """What the model called: a name, and its arguments as a text in JSON."""

    name: str = Field(pattern=FUNCTION_NAME)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            raise ValueError("arguments are not JSON") from None
        if not isinstance(given, dict):
            raise ValueError("arguments are not a JSON object")
        return arguments


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Strict):
    """How the model is to behave; templates know `developer` as `system`."""

    role: Literal["system", "developer"]
    content: Content

    def turn(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": "system", "content": text_of(self.content)}


class UserMessage(Strict):
    """What the user said."""

    role: Literal["user"]
    content: Content

    def turn(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": "user", "content": text_of(self.content)}


class AssistantMessage(Strict):
    """What the model said, or the tools it called."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and self.tool_calls is None:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self

    def turn(self) -> dict[str, Any]:
        """The message as a chat template reads it: arguments of calls are objects there."""
        said: dict[str, Any] = {"role": "assistant", "content": text_of(self.content or "")}
        if self.tool_calls:
            said["tool_calls"] = [
                call.model_dump() | {"function": {"name": call.function.name, "arguments": _object(call)}}
                for call in self.tool_calls
            ]
        return said


class ToolMessage(Strict):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(min_length=1, max_length=128)

    def turn(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": "tool", "content": text_of(self.content), "tool_call_id": self.tool_call_id}


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _object(call: ToolCall) -> dict[str, Any]:
    return json.loads(call.function.arguments)


class Function(Strict):
    """A function that the model may call; its parameters are a JSON Schema."""

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None
    """Arguments of a forced call follow the schema either way."""


class Tool(Strict):
    """Something the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The function that is to be called."""

    name: str = Field(pattern=FUNCTION_NAME)


class NamedTool(Strict):
    """The model is to call this one."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema and what it is called."""

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The answer follows the schema either way."""


class SchemaFormat(Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
