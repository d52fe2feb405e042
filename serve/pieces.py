"""What a choice gains step by step, and the whole of it. Imports neither ray nor torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..rollout.engine import TokenEvent
from ..rollout.records import TopLogprobs
from .text import IncrementalText
from .tools import Call, CallReader


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one choice has gained since its last piece; the last one carries the reason it ended."""

    choice: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """Sampled tokens that are part of the text (a stop token is not), with their log-probs."""
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    """For each the likeliest tokens, where they were asked for."""
    sampled: int = 0
    """Tokens generated, the stop token included."""
    calls: list[Call] = field(default_factory=list)
    first_call: int = 0
    """How many calls this choice has made before."""
    finish_reason: str | None = None

    def add(self, piece: "Piece") -> None:
        """What the same choice has gained then."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.tops += piece.tops
        self.sampled += piece.sampled
        self.calls += piece.calls
        self.finish_reason = piece.finish_reason


@dataclass(slots=True, kw_only=True)
class Row:
    """A completion that is being generated."""

    choice: int
    text: IncrementalText
    stop_tokens: frozenset[int]
    reader: CallReader | None = None
    calls: int = 0

    def take(self, events: list[TokenEvent]) -> Piece:
        """Its new tokens as a piece."""
        kept = [e for e in events if not (e.finish_reason == "stop" and e.token in self.stop_tokens)]
        reason = events[-1].finish_reason
        piece = Piece(
            choice=self.choice,
            text="".join(self.text.push(event.token) for event in kept),
            tokens=[event.token for event in kept],
            logprobs=[event.logprob for event in kept],
            tops=[event.top for event in kept if event.top is not None],
            sampled=len(events),
            first_call=self.calls,
            finish_reason="stop" if reason and self.text.stopped else reason,
        )
        if reason:
            piece.text += self.text.finish()
        if self.reader:
            self._read(self.reader, piece)
        return piece

    def _read(self, reader: CallReader, piece: Piece) -> None:
        piece.text, piece.calls = reader.push(piece.text)
        if piece.finish_reason:
            text, calls = reader.finish()
            piece.text, piece.calls = piece.text + text, piece.calls + calls
            if reader.called and piece.finish_reason == "stop":
                piece.finish_reason = "tool_calls"
        self.calls += len(piece.calls)


def join(pieces: Iterable[Piece]) -> list[Piece]:
    """The whole of every choice, in order of choices, from its pieces in order of time."""
    whole: dict[int, Piece] = {}
    for piece in pieces:
        if piece.choice in whole:
            whole[piece.choice].add(piece)
        else:
            whole[piece.choice] = piece
    return [whole[choice] for choice in sorted(whole)]


def likeliest(top: TopLogprobs) -> list[tuple[int, float]]:
    """Tokens and log-probs, best first, without those that could not be drawn."""
    return [(int(token), float(p)) for token, p in zip(*top, strict=True) if np.isfinite(p)]
