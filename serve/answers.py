"""Answers in OpenAI's shapes, whole and streamed, for chat completions and for completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .pieces import Piece, likeliest

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Tokens(Protocol):
    """Says single tokens."""

    def token_text(self, token: int) -> str:
        """As text."""
        ...

    def token_bytes(self, token: int) -> list[int]:
        """As bytes, which may be a part of a character only."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer and every chunk of a stream begins with."""

    model: str
    digest: str
    prefix: str
    object: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The answer with these choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.digest,
            "choices": choices,
            **more,
        }


class Shape(Protocol):
    """How one endpoint says what was generated."""

    def head(self, model: str, digest: str, *, stream: bool) -> Head:
        """What the answer begins with."""
        ...

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk's choice of a stream, before any text."""
        ...

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """A choice: what a chunk adds, or the whole."""
        ...


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`/v1/chat/completions`."""

    words: Tokens
    logprobs: bool

    def head(self, model: str, digest: str, *, stream: bool) -> Head:
        return Head(model, digest, "chatcmpl", "chat.completion.chunk" if stream else "chat.completion")

    def opening(self, choice: int) -> dict[str, Any] | None:
        return {
            "index": choice,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "delta" if stream else "message": _delta(piece) if stream else _message(piece),
            "logprobs": {"content": self._logprobs(piece), "refusal": None} if self.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        tops: Sequence[Any] = piece.tops or [None] * len(piece.tokens)
        return [
            self._token(token, logprob)
            | {"top_logprobs": [self._token(*best) for best in likeliest(top)] if top else []}
            for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True)
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        said = self.words
        return {
            "token": said.token_text(token),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": said.token_bytes(token),
        }


def _message(piece: Piece) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
    if piece.calls:
        said |= {"content": piece.text or None, "tool_calls": [call for _, call in _calls(piece)]}
    return said


def _delta(piece: Piece) -> dict[str, Any]:
    said: dict[str, Any] = {"content": piece.text} if piece.text else {}
    if piece.calls:
        said["tool_calls"] = [{"index": index} | call for index, call in _calls(piece)]
    return said


def _calls(piece: Piece) -> list[tuple[int, dict[str, Any]]]:
    return [
        (i, {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
        for i, call in enumerate(piece.calls, piece.first_call)
    ]


@dataclass(slots=True)
class CompletionShape:
    """`/v1/completions`."""

    words: Tokens
    logprobs: int | None
    """How many of the likeliest tokens come with each; none for no log-probs at all."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice's tokens so far."""

    def head(self, model: str, digest: str, *, stream: bool) -> Head:
        return Head(model, digest, "cmpl", "text_completion")

    def opening(self, choice: int) -> dict[str, Any] | None:
        return None

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if self.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = [self.words.token_text(token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(piece.choice, 0))
            self._offsets[piece.choice] = offsets[-1] + len(text)
        tops = [{self.words.token_text(token): p for token, p in likeliest(top)} for top in piece.tops]
        return {
            "tokens": texts,
            "token_logprobs": [max(p, _LEAST_LOGPROB) for p in piece.logprobs],
            "text_offset": offsets,
            "top_logprobs": tops if self.logprobs else None,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens an answer cost."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
