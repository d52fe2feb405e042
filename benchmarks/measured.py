"""One measured repetition, and the case that pairs are measured for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arena import Arena


class Skipped(Exception):
    """A case cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One repetition: the amount of work done, its wall seconds, and the CPU seconds of the one who did it."""

    amount: float
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Work per wall second."""
        return self.amount / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Work per CPU second: what it would be on a core of one's own."""
        return self.amount / self.cpu_seconds


def measure(amount: float, work: Callable[[], Any]) -> Measured:
    """Do the work and time it in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Measured(amount=amount, seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What a case measures: both sides do the work of a pair, by its number, and say how long it took."""

    ours: Callable[[int], Measured]
    theirs: Callable[[int], Measured]
    warm_up: Callable[[], Any]
    limit: Callable[[], float] | None = None
    """The rate that the machine allows at most, measured on the spot."""
    limit_ratio: float | None = None
    """Instead of a rate: the ratio that is possible at most."""
    settings: dict[str, Any]
    """What was generated, for the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a result file. Cases with the same `group` follow each other and share an arena."""

    name: str
    peer: str
    unit: str
    group: str
    make: "Callable[[Arena], Contest]"
    """Builds what is needed. Raises `Skipped`."""
