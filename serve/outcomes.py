"""How requests end, by model, and when that speaks for going back to the model before."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from ..cluster.errors import InputError, RaylignError
from .api_errors import ApiError
from .config import Guard

_KEPT = 20_000
"""Ends that are remembered, of all models together."""


@dataclass(frozen=True, slots=True)
class End:
    """One request, as it ended."""

    when: float
    """Seconds since the epoch."""
    digest: str
    failed: bool
    """Through the model or the service, not through what the client asked."""
    first_token: float | None
    """Seconds to it; none where there was no token."""


class Outcomes:
    """The latest requests of one replica."""

    def __init__(self) -> None:
        self._ends: deque[End] = deque(maxlen=_KEPT)

    def note(self, end: End) -> None:
        """Remember how a request ended."""
        self._ends.append(end)

    def objection(self, digest: str, since: float, guard: Guard) -> str:
        """What its requests since then say against a model; empty where nothing, or too few were asked.

        Errors that the other models have as often are the service's, and not held against this one.
        """
        ends = [end for end in self._ends if end.when >= since]
        own = [end for end in ends if end.digest == digest]
        if len(own) < guard.requests:
            return ""
        others = [end for end in ends if end.digest != digest]
        failed = _share_failed(own)
        if failed > guard.errors and not (len(others) >= guard.requests and _share_failed(others) > guard.errors):
            return f"{failed:.0%} of {len(own)} requests failed, more than {guard.errors:.0%}"
        slow = _median(end.first_token for end in own if end.first_token is not None)
        if guard.first_token_seconds and slow > guard.first_token_seconds:
            allowed = f"{guard.first_token_seconds:g} s are allowed"
            return f"half of {len(own)} requests waited {slow:.3g} s or more for a token, {allowed}"
        return ""


class Watch:
    """A block that is one request: how it ends is noted. A client that leaves or asks amiss is no failure."""

    def __init__(self, outcomes: Outcomes, digest: str) -> None:
        self._outcomes, self._digest = outcomes, digest
        self._began = time.monotonic()
        self._first: float | None = None

    def first_token(self) -> None:
        """The first token is there."""
        self._first = time.monotonic() - self._began

    async def __aenter__(self) -> None:
        self._began = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = _is_failure(error)
        if failed or error is None:
            self._outcomes.note(End(time.time(), self._digest, failed, self._first))


def _is_failure(error: BaseException | None) -> bool:
    if isinstance(error, ApiError):
        return error.status >= 500
    return isinstance(error, RaylignError | TimeoutError) and not isinstance(error, InputError)


def _share_failed(ends: list[End]) -> float:
    return sum(end.failed for end in ends) / len(ends)


def _median(values: Iterable[float]) -> float:
    found = sorted(values)
    return found[len(found) // 2] if found else 0.0
