"""What a name points at: one model or several by weight, and every move it has made. Imports neither ray nor torch."""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..cluster.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One move of a name."""

    weights: dict[str, float]
    """The part of its users that each digest answers; they add up to 1."""
    since: float
    """Seconds since the epoch."""
    why: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What the gate saw: `questions` (their digest) and a score each temperature."""
    restores: int | None = None
    """A rollback names the move that it brought back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name and its moves, oldest first; there is at least one."""

    name: str
    moves: tuple[Move, ...]

    @property
    def now(self) -> Move:
        """Where it points."""
        return self.moves[-1]

    @property
    def digest(self) -> str:
        """The model of most of its users."""
        return max(sorted(self.now.weights), key=lambda digest: self.now.weights[digest])

    def pick(self, user: str | None) -> str:
        """The digest that answers a user: always the same for one user as long as the weights stay.

        A user whom more weight moves to a model stays there while that weight only grows; no user gets the main model.
        """
        weights = self.now.weights
        if user is None or len(weights) == 1:
            return self.digest
        hashed = hashlib.sha256(f"{self.name}\0{user}".encode()).digest()
        place, reached = int.from_bytes(hashed[:8], "big") / 2**64, 0.0
        others = sorted((digest for digest in weights if digest != self.digest), key=lambda d: (weights[d], d))
        for digest in others:
            reached += weights[digest]
            if place < reached:
                return digest
        return self.digest

    def moved(self, move: Move) -> "Alias":
        """With one more move; the same where it changes nothing."""
        return self if move.weights == self.now.weights else replace(self, moves=(*self.moves, move))

    def rolled_back(self, since: float, why: str) -> "Alias":
        """Back where it pointed before. Repeated, it goes back further. Raises `InputError` at its first move."""
        here = self.now.restores if self.now.restores is not None else len(self.moves) - 1
        if here == 0:
            raise InputError(f"alias {self.name!r} has pointed at nothing else before: there is nothing to go back to")
        before = self.moves[here - 1]
        back = before.restores if before.restores is not None else here - 1
        return replace(self, moves=(*self.moves, replace(self.moves[back], since=since, why=why, restores=back)))

    def as_json(self) -> dict[str, Any]:
        """What its file holds."""
        return asdict(self)

    @staticmethod
    def of_json(record: dict[str, Any]) -> "Alias":
        """Read what `as_json` gave."""
        return Alias(name=record["name"], moves=tuple(Move(**move) for move in record["moves"]))


def parse_split(text: str) -> tuple[str, dict[str, float]]:
    """`NAME=a:90,b:10` as the name and the part of each model; parts need not add up to 100.

    Raises `InputError` for anything else.
    """
    name, _, parts = text.partition("=")
    weights: dict[str, float] = {}
    for part in parts.split(","):
        model, _, number = part.rpartition(":")
        if not name or not model or not number.isascii() or not number.isdigit() or not int(number):
            raise InputError(f"split {text!r} must be NAME=MODEL:PART,MODEL:PART with whole parts from 1, as a:90,b:10")
        if model in weights:
            raise InputError(f"split {text!r} names {model!r} twice")
        weights[model] = int(number)
    total = sum(weights.values())
    return name, {model: weight / total for model, weight in weights.items()}
