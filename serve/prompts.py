"""Requests into tokens, and tokens into text: all that a service does with the model's tokenizer."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from ..cluster.errors import InputError
from ..rollout.chat import encode_prompt, stop_tokens
from .api_errors import bad_request
from .messages import Message, Tool
from .tools import Notation, notation_of


class Prompts:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.stop_tokens = tuple(sorted(stop_tokens(tokenizer)))
        """Tokens that end an answer."""
        fast = getattr(tokenizer, "backend_tokenizer", None)
        # Called for every token: transformers' own way there takes five times as long and gives the same.
        self._decode = fast.decode if fast else partial(tokenizer.decode, clean_up_tokenization_spaces=False)

    @cached_property
    def notation(self) -> Notation | None:
        """How the model calls tools; none where it has no way that is known here."""
        return notation_of(self._tokenizer.chat_template or "")

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """A conversation in tokens, through the model's own template, open for the assistant's turn.

        Raises a 400 where the model has no template or none with tools, or it refuses the messages.
        """
        if tools and self.notation is None:
            raise bad_request("this model's chat template has no tools that this service can read", param="tools")
        turns = [message.turn() for message in messages]
        offered = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]
        try:
            return encode_prompt(self._tokenizer, turns, offered)
        except InputError as error:
            if self._tokenizer.chat_template:
                raise bad_request(str(error), param="messages") from None
            raise bad_request(f"{error}: ask /v1/completions", param="model") from None

    def text(self, prompt: str | list[int]) -> list[int]:
        """A prompt in tokens. Raises a 400 for tokens that the model does not have."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            raise bad_request(f"prompt has tokens outside 0..{len(self._tokenizer) - 1}", param="prompt")
        return prompt

    def decode(self, tokens: list[int]) -> str:
        """A completion's tokens as text."""
        return self._decode(tokens, skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token as text, for log-probs."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> list[int]:
        """The bytes of one token, which may be a part of a character only."""
        return list(self._bytes.decode_bytes([token]))

    @cached_property
    def _bytes(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, slices=[])
