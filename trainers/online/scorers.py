"""As many scorers as are asked for, which may change while groups are scored.

What a group is worth does not depend on who scores it, so they come and go without a trace in the result: one that is
on its way gets groups when it is up, one that is to leave finishes what it was given first.
"""

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import ElasticWorkers
from ...cluster.errors import RaylignError
from ...rollout.fleet import Note
from ...rollout.inbox import Inbox
from ...rollout.pool_rules import moves, pause
from .scoring import Scoring

LOAD_SECONDS = 1800.0
"""How long an actor may take to load its model or its rewards once it has a place."""

LEAVE_SECONDS = 60.0
"""How long one that has nothing left to do may take to say what it has counted."""


@dataclass(slots=True, eq=False)
class Coming:
    """A scorer that was asked for and is not up yet, and its place, which it may wait for."""

    actor: Any
    placement: Any
    since: float = field(default_factory=time.time)
    placed: float | None = None
    """When it was seen to have its place, of the monotonic clock."""


class Crew(Protocol):
    """Who starts and ends the actors."""

    def ask_for_scorer(self, name: str) -> Coming:
        """Ask for a place and a scorer in it; returns at once."""
        ...

    def keep(self, name: str, coming: Coming) -> str:
        """Count a scorer that is up among the actors of the stage; gives its node."""
        ...

    def stands(self, coming: Coming) -> bool:
        """Whether one on its way has its place."""
        ...

    def give_up(self, coming: Coming) -> None:
        """End one that was on its way."""
        ...

    def end_one(self, name: str) -> None:
        """End one that was up; `gone` is told of it."""
        ...


class Scorers:
    """Moves towards `target` scorers within the recipe's bounds. One thread calls it."""

    def __init__(self, workers: ElasticWorkers, crew: Crew, scoring: Scoring, inbox: Inbox, note: Note) -> None:
        self._bounds, self._crew, self._scoring, self._inbox, self._note = workers, crew, scoring, inbox, note
        self.target = workers.start
        self._there: dict[str, Any] = {}
        """Those that are up and stay, the oldest first."""
        self._leaving: dict[str, Any] = {}
        self._asked: dict[str, float] = {}
        """Of those who leave, who was asked for the counters that remain of him, and when."""
        self._coming: dict[str, Coming] = {}
        self._left: Counter[str] = Counter()
        """The counters of those who are gone because fewer were asked for."""
        self._next = workers.start
        self._failed_starts, self._join_after = 0, 0.0
        self.steady = False
        """Whether all who are to be there at the start are; only then `reconcile` starts others."""

    @property
    def count(self) -> int:
        """Scorers that are up and stay."""
        return len(self._there)

    def missing(self) -> list[str]:
        """Names for those that are to be started at once: free ones, the first first."""
        free = (name for i in range(self._next) if (name := f"reward-{i}") not in self._all())
        return [name for name, _ in zip(free, range(self.target - len(self._there) - len(self._coming)), strict=False)]

    def join(self, name: str, actor: Any, node: str) -> None:
        """One is up, or about to be."""
        self._there[name] = actor
        self._scoring.join(name, actor, node)

    def gone(self, name: str) -> None:
        """One was ended."""
        for names in (self._there, self._leaving):
            names.pop(name, None)
        self._asked.pop(name, None)
        self._scoring.leave(name)

    def scale(self, target: int) -> int:
        """Ask for another number, within the recipe's bounds; returns what is asked for now."""
        self.target = min(max(target, self._bounds.min), self._bounds.max)
        self.reconcile()
        return self.target

    def reconcile(self) -> None:
        """Start what is missing, give up and drain what is too much, end who has finished; never waits."""
        if not self.steady:
            return
        due = moves(self.target, list(self._there), list(self._coming))
        for _ in range(due.start if time.monotonic() >= self._join_after else 0):
            name = f"reward-{self._next}"
            self._next += 1
            coming = self._coming[name] = self._crew.ask_for_scorer(name)
            self._inbox.expect(coming.actor.__ray_ready__.remote(), partial(self._on_up, name))
        for name in due.unwanted:
            self._crew.give_up(self._coming.pop(name))
        for name in due.drain:
            self._leaving[name] = self._there.pop(name)
            self._scoring.drain(name)
        for name in [name for name in self._leaving if name not in self._asked and self._scoring.idle(name)]:
            self._asked[name] = time.monotonic()
            self._inbox.expect(self._leaving[name].counters.remote(), partial(self._on_done, name))
        self._give_up_late()

    def _give_up_late(self) -> None:
        """Let nobody who hangs stay on his way in or out."""
        now = time.monotonic()
        for name in [name for name, asked in self._asked.items() if now - asked > LEAVE_SECONDS]:
            self._crew.end_one(name)
            self._note("scorer_left", scorer=name)
        for name, coming in list(self._coming.items()):
            if coming.placed is None:
                coming.placed = now if self._crew.stands(coming) else None
            elif now - coming.placed > LOAD_SECONDS:
                self._start_failed(name, coming, f"{name} did not start within {LOAD_SECONDS:.0f} s")

    def ask_counters(self) -> tuple[Counter[str], dict[str, Any]]:
        """What is counted of those who left, and the calls for the counters of those who stay."""
        return Counter(self._left), {name: actor.counters.remote() for name, actor in self._there.items()}

    def leaves(self, name: str) -> bool:
        """Whether one only finishes what it was given."""
        return name in self._leaving

    def waiting(self, prefix: str) -> list[Wait]:
        """Those on their way."""
        return [Wait("its place and start", f"{prefix}{name}", "", c.since) for name, c in self._coming.items()]

    def close(self) -> None:
        """Give up who is on the way."""
        self.steady = False
        for name in list(self._coming):
            self._crew.give_up(self._coming.pop(name))

    def _all(self) -> set[str]:
        return {*self._there, *self._leaving, *self._coming}

    def _on_up(self, name: str, future: "Future[Any]") -> None:
        coming = self._coming.pop(name, None)
        if coming is None:  # it was given up
            return
        if error := _error(name, "its start", future):
            self._start_failed(name, coming, str(error))
            return
        self._failed_starts = 0
        self.join(name, coming.actor, self._crew.keep(name, coming))
        self._note("scorer_joined", scorer=name)

    def _start_failed(self, name: str, coming: Coming, reason: str) -> None:
        self._coming.pop(name, None)
        self._crew.give_up(coming)
        self._failed_starts += 1
        self._join_after = time.monotonic() + pause(self._failed_starts)
        self._note("scorer_failed", scorer=name, reason=reason)

    def _on_done(self, name: str, future: "Future[Any]") -> None:
        if name not in self._asked:  # it was lost meanwhile
            return
        if not _error(name, "its counters", future):
            self._left.update(future.result())
        self._crew.end_one(name)
        self._note("scorer_left", scorer=name)


def _error(name: str, what: str, future: "Future[Any]") -> RaylignError | None:
    try:
        calls.outcome(future, actor=name, what=what)
    except RaylignError as error:
        return error
    return None
