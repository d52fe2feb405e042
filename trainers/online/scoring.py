"""The scorers of a stage at work: each group is scored as it comes, by the scorer that has the fewest."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.errors import RaylignError, WorkerLost
from ...rollout.inbox import Inbox
from ...rollout.records import Group

Then = Callable[[Group], None]


@dataclass(slots=True, eq=False)
class _Scorer:
    actor: Any
    node: str
    open: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Its calls by number, in order: of which group, and since when."""
    heard: float = 0.0
    leaving: bool = False

    def first(self) -> tuple[str, float] | None:
        """What it is at, and since when: it scores one group after the other."""
        for what, asked in self.open.values():
            return what, max(asked, self.heard)
        return None


class Scoring:
    """Gives groups to scorers and hands them back with rewards; a scorer has `timeout` seconds for each.

    What goes wrong is kept until somebody asks `failed`: an update under way is not to be ended by it.
    """

    def __init__(self, inbox: Inbox, timeout: float) -> None:
        self._inbox, self._timeout = inbox, timeout
        self._scorers: dict[str, _Scorer] = {}
        self._failed: dict[str, RaylignError] = {}
        self._calls = itertools.count()

    def join(self, name: str, actor: Any, node: str) -> None:
        """Another scorer, or a new one in the place of one that was lost."""
        self._scorers[name] = _Scorer(actor, node)

    def leave(self, name: str) -> None:
        """A scorer is gone, and what it was asked with it."""
        self._scorers.pop(name, None)
        self._failed.pop(name, None)

    def drain(self, name: str) -> None:
        """A scorer is to leave: it gets no more groups."""
        self._scorers[name].leaving = True

    def idle(self, name: str) -> bool:
        """Whether a scorer has answered all that it was asked."""
        return not self._scorers[name].open

    def score(self, group: Group, then: Then) -> None:
        """Have a group scored; `then` gets it, and must not raise."""
        name, scorer = min(self._scorers.items(), key=lambda item: (item[1].leaving, len(item[1].open)))
        call, what = next(self._calls), f"step {group.step} group {group.index}"
        scorer.open[call] = what, time.monotonic()
        self._inbox.expect(scorer.actor.score.remote(group), partial(self._on_scored, name, call, then))

    def _on_scored(self, name: str, call: int, then: Then, future: "Future[Any]") -> None:
        scorer = self._scorers.get(name)
        if scorer is None or call not in scorer.open:  # it left, and another one has its name
            return
        (what, _), scorer.heard = scorer.open.pop(call), time.monotonic()
        try:
            group = calls.outcome(future, actor=name, what=what)
        except RaylignError as error:
            self._failed.setdefault(name, error)
        else:
            then(group)

    def withdraw(self) -> None:
        """What was asked so far is not waited for: the time of what a scorer is at begins anew."""
        self._failed.clear()
        for scorer in self._scorers.values():
            scorer.heard = time.monotonic()

    def failed(self) -> dict[str, RaylignError]:
        """Scorers whose calls failed, and those that are late."""
        now = time.monotonic()
        for name, scorer in self._scorers.items():
            if (at := scorer.first()) and now - at[1] > self._timeout:
                late = WorkerLost(f"{name} did not finish {at[0]} within {self._timeout:.0f} s")
                self._failed.setdefault(name, late)
        return self._failed

    def waiting(self, prefix: str) -> list[Wait]:
        """What each scorer is at."""
        working = [(name, scorer, at) for name, scorer in self._scorers.items() if (at := scorer.first())]
        return [
            Wait(f"the reward of {what}", f"{prefix}{name}", scorer.node, calls.epoch(since))
            for name, scorer, (what, since) in working
        ]
