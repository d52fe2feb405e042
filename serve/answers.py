"""Answers in OpenAI's shapes, whole and streamed, for chat completions and for completions."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from .service import Piece

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TokenText(Protocol):
    """Gives one token as text."""

    def __call__(self, token: int, /) -> str: ...


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

    token_text: TokenText
    logprobs: bool

    def head(self, model: str, digest: str, *, stream: bool) -> Head:
        return Head(model, digest, "chatcmpl", "chat.completion.chunk" if stream else "chat.completion")

    def opening(self, choice: int) -> dict[str, Any] | None:
        return {"index": choice, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if stream:
            said = {"content": piece.text} if piece.text else {}
        return {
            "index": piece.choice,
            "delta" if stream else "message": said,
            "logprobs": self._logprobs(piece) if self.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens = [
            (self.token_text(token), logprob) for token, logprob in zip(piece.tokens, piece.logprobs, strict=True)
        ]
        content = [
            {"token": text, "logprob": max(p, _LEAST_LOGPROB), "bytes": list(text.encode()), "top_logprobs": []}
            for text, p in tokens
        ]
        return {"content": content, "refusal": None}


@dataclass(slots=True)
class CompletionShape:
    """`/v1/completions`."""

    token_text: TokenText
    logprobs: bool
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
            "logprobs": self._logprobs(piece) if self.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = [self.token_text(token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(piece.choice, 0))
            self._offsets[piece.choice] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(p, _LEAST_LOGPROB) for p in piece.logprobs],
            "text_offset": offsets,
            "top_logprobs": None,
        }


def join(pieces: list[Piece]) -> list[Piece]:
    """The whole of every choice, in order of choices, from its pieces in order of time."""
    whole: dict[int, Piece] = {}
    for piece in pieces:
        before = whole.get(piece.choice)
        whole[piece.choice] = piece if before is None else _add(before, piece)
    return [whole[choice] for choice in sorted(whole)]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens an answer cost."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _add(before: Piece, piece: Piece) -> Piece:
    return Piece(
        choice=before.choice,
        text=before.text + piece.text,
        tokens=before.tokens + piece.tokens,
        logprobs=before.logprobs + piece.logprobs,
        sampled=before.sampled + piece.sampled,
        finish_reason=piece.finish_reason,
    )
