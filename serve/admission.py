"""Who is let in: the rows a replica holds at once, and the requests and tokens a key may have a minute.

Pure: the caller gives the time. Imports neither ray nor torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .api_errors import too_many
from .keys import Key

_FIRST_GUESS = 1.0
_LONGEST_WAIT = 30.0


@dataclass(slots=True)
class Bucket:
    """A token bucket: holds a minute's worth, and fills at a sixtieth of it a second. May be overdrawn."""

    per_minute: float
    level: float
    since: float

    @classmethod
    def full(cls, per_minute: float, now: float) -> "Bucket":
        """With a whole minute's worth."""
        return cls(per_minute, per_minute, now)

    def wait(self, amount: float, now: float) -> float:
        """How many seconds until `amount` is in it; 0 where it is."""
        self.level = min(self.per_minute, self.level + (now - self.since) * self.per_minute / 60)
        self.since = now
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


@dataclass(slots=True)
class Quotas:
    """What every key has left, in this process; a key whose limits change begins anew."""

    _buckets: dict[tuple[str, str, float], Bucket] = field(default_factory=dict)

    def enter(self, key: Key | None, now: float) -> None:
        """Count a request. Raises a 429 with the time to wait where the key has none, or no token, left."""
        wanted = self._of(key, now)
        for unit, bucket in wanted.items():
            if wait := bucket.wait(1, now):
                raise too_many(
                    f"this key's limit of {bucket.per_minute:g} {unit} a minute is reached",
                    retry_after=wait,
                    code="rate_limit_exceeded",
                )
        if requests := wanted.get("requests"):
            requests.level -= 1

    def spend(self, key: Key | None, tokens: int, now: float) -> None:
        """Count tokens that were used; what is overdrawn has to be waited for."""
        if key and (bucket := self._of(key, now).get("tokens")):
            bucket.level -= tokens

    def _of(self, key: Key | None, now: float) -> dict[str, Bucket]:
        if key is None:
            return {}
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        return {
            unit: self._buckets.setdefault((key.sha256, unit, limit), Bucket.full(limit, now))
            for unit, limit in limits.items()
            if limit is not None
        }


class Admission:
    """Counts the completions that run or wait on a replica; more than `most` are refused, not queued."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.inside = 0
        self._seconds = _FIRST_GUESS

    @contextmanager
    def enter(self, rows: int) -> Iterator[None]:
        """Hold `rows` places. Raises a 429 where they are not free; a request alone is always let in."""
        if self.inside and self.inside + rows > self.most:
            raise too_many(
                f"{self.inside} completions are generated or wait here, {rows} more are too many: try again later",
                retry_after=min(self._seconds, _LONGEST_WAIT),
                code="overloaded",
            )
        self.inside += rows
        try:
            yield
        finally:
            self.inside -= rows

    def took(self, seconds: float) -> None:
        """A request was answered in so many seconds, which tells others how long to wait."""
        self._seconds += 0.2 * (seconds - self._seconds)
