"""OpenAI's requests, as far as this service has them. Imports neither ray nor torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .messages import Message, NamedTool, ResponseFormat, Strict, Tool, ToolChoice

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
INT64 = 2**63

Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    """What a stream carries besides the pieces."""

    include_usage: bool = False


class GenerationFields(Strict):
    """What chat completions and completions share."""

    model: str = Field(min_length=1, max_length=128)
    max_tokens: int | None = Field(default=None, ge=1, lt=INT64)
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    logit_bias: dict[Token, Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    """Added to these tokens' logits."""
    presence_penalty: Penalty = 0.0
    """Taken from the logit of every token that the completion has already."""
    frequency_penalty: Penalty = 0.0
    """Taken from it as often as the completion has it."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> "GenerationFields":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a completion."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """The most tokens of one completion; none is whatever room there is."""
        return self.max_tokens

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens to report with every token."""
        return 0


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT64)
    logprobs: bool = False
    """The log-prob of each sampled token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Literal[True] = True
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools must have names of their own")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools")
        if self.offered and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format other than text cannot be asked for together with tools")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int:
        return self.top_logprobs or 0

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced(self) -> list[Tool]:
        """The tools of which it must call one; none where it may answer in words."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`; `prompt` is a text, tokens, or a list of either."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[str], Field(max_length=MAX_CHOICES)]
        | list[Token]
        | Annotated[list[list[Token]], Field(max_length=MAX_CHOICES)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """The log-prob of each sampled token, and those of so many of the likeliest."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """One item a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0
