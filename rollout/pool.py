"""The elastic pool: groups are generated while rollout workers join, leave, hang and die.

It decides who gets which group; what a group yields depends on its seed key alone, so the result is the same for any
number of workers, any of their deaths, and whoever is first with a group that two of them run.
"""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..cluster import calls
from ..cluster.calls import Wait
from ..cluster.errors import InputError, RaylignError, RunFailed, WorkerLost
from ..cluster.weights import WeightVersion
from .fleet import LOOK_SECONDS, Fleet, Note
from .ledger import GroupState, Ledger
from .member import Member, Run
from .places import Places
from .pool_rules import Running, assign, give_up, longest_first, overdue, prompt_key
from .records import Group
from .worker import RolloutActor, WorkerSpec

Tick = Callable[[], None]
"""Called at least twice a second during a wait; what it raises ends the wait."""


@dataclass(slots=True)
class Work:
    """The step under way."""

    ledger: Ledger
    tasks: dict[int, Group]
    rank: dict[int, int]
    """Group → its place in the order of dispatch."""
    pending: list[tuple[int, int]]
    """A heap of (rank, group): what is to be given out."""
    seconds: list[float] = field(default_factory=list)
    """How long the groups that are done took."""

    def again(self, indices: Sequence[int]) -> None:
        """Groups are to be given out again."""
        for index in indices:
            heapq.heappush(self.pending, (self.rank[index], index))

    def first(self, count: int) -> list[int]:
        """Take the first groups in the order of dispatch, at most so many."""
        return [heapq.heappop(self.pending)[1] for _ in range(min(count, len(self.pending)))]


class RolloutPool:
    """Generates groups on a fleet of workers that changes meanwhile. One thread calls it.

    `role` is the class of their actors: `RolloutActor`, or one with its methods. `places` are those of the stage whose
    roles wish to stand together or apart.
    """

    def __init__(
        self,
        *,
        prefix: str,
        spec: WorkerSpec,
        wait_seconds: float,
        note: Note,
        role: type = RolloutActor,
        places: Places | None = None,
    ) -> None:
        self._bounds, self._note = spec.config.workers, note
        self._fleet = Fleet(
            prefix, spec, role, wait_seconds=wait_seconds, note=note, on_lost=self._on_lost, places=places
        )
        self._work: Work | None = None
        self._done: deque[Group] = deque()
        self._yielded: dict[int, int] = {}
        """Prompt → tokens of the longest completion it gave the last time."""
        self._calls = itertools.count()
        self._fatal: RaylignError | None = None

    @property
    def size(self) -> int:
        """Workers that have proved themselves and are not leaving."""
        return len(self._fleet.ready())

    @property
    def names(self) -> tuple[str, ...]:
        """Who they are, in the order of their start."""
        return tuple(member.name for member in self._fleet.ready())

    @property
    def target(self) -> int:
        """Workers that are asked for."""
        return self._fleet.target

    @property
    def restarts(self) -> int:
        """How often a worker was replaced."""
        return self._fleet.restarts

    def start(self, weights: WeightVersion, *, tick: Tick) -> None:
        """Bring up the first workers with a version; those that find no place beyond the least are not waited for.

        Raises `RunFailed` or `DoesNotFit` when they cannot be had.
        """
        self._fleet.set_weights(weights)
        self._fleet.reconcile()
        while self.size < self.target and not (self.size >= self._bounds.min and self._fleet.held_up()):
            self._turn(tick, least=self._bounds.min)

    def scale(self, target: int) -> int:
        """Ask for another number of workers, within the recipe's bounds; returns what is asked for now."""
        self._fleet.target = min(max(target, self._bounds.min), self._bounds.max)
        self._fleet.reconcile()
        return self.target

    def advance(self) -> None:
        """Take in what has come and move on, without waiting; for the phases in which nothing is generated."""
        self._fleet.inbox.take(0)
        self._fleet.look()

    def set_weights(self, weights: WeightVersion, *, tick: Tick) -> None:
        """Make a version the one to generate from; returns when the first worker has proved its digest.

        The others go on proving: who has not is given no groups, who does not in time is replaced. Raises `RunFailed`
        when all of them refuse it: then the version is wrong, not a worker.
        """
        self._fleet.set_weights(weights)
        while not any(m.version == weights.version for m in self._fleet.ready()):
            self._turn(tick)

    def generate(self, groups: Sequence[Group], ledger: Ledger, *, tick: Tick) -> Iterator[Group]:
        """Yield each group once, with its completions, as it is done. The ledger names the weights they come from.

        Raises `RunFailed` when no worker is left and none can come, or a group fails everywhere.
        """
        self._require(ledger)
        tasks = {g.index: replace(g, version=ledger.version, digest=ledger.digest) for g in groups}
        order = list(enumerate(longest_first(groups, self._yielded)))
        self._work = Work(ledger, tasks, rank={index: place for place, index in order}, pending=order)
        try:
            while not ledger.complete(GroupState.GENERATED) or self._done:
                self._dispatch()
                if not self._done:
                    self._turn(tick)
                while self._done:
                    yield self._done.popleft()
        finally:
            self._work = None
            self._done.clear()
            for member in self._fleet.members.values():
                self._abandon(member, [call for call, _ in member.wanted()])

    def waiting(self) -> list[Wait]:
        """What is waited for from each worker now."""
        return self._fleet.waiting()

    def close(self) -> None:
        """End every worker, those on their way too."""
        self._fleet.close()

    def _require(self, ledger: Ledger) -> None:
        current = self._fleet.weights
        if current is None or (current.version, current.digest) != (ledger.version, ledger.digest):
            have = f"version {current.version}" if current else "none"
            raise RunFailed(f"step {ledger.step} is to come from weight version {ledger.version}, workers have {have}")

    def _turn(self, tick: Tick, least: int = 1) -> None:
        """Wait shortly for what comes and act on it. Raises what ends the run."""
        tick()
        self._fleet.inbox.take(LOOK_SECONDS)
        if self._fleet.look():
            self._duplicate(time.monotonic())
        if error := self._fatal or self._fleet.fatal:
            raise error
        self._fleet.refuse_to_wait_for_places(least)

    def _dispatch(self) -> None:
        """Give each pending group, the longest expected first, to the worker with the fewest, as far as slots go."""
        work = self._work
        if not work or not work.pending:
            return
        room, capacity = self._fleet.room(work.ledger.version, time.monotonic()), self._fleet.capacity
        free = sum(capacity - count for count in room.values())
        for index, name in assign(work.first(free), room, capacity):
            work.ledger.dispatch(index, name)
            self._give(work, index, name)

    def _duplicate(self, now: float) -> None:
        """With nothing left to give out, have groups that take long run on another worker too."""
        work = self._work
        if not work or work.pending:
            return
        running = [
            Running(run.index, now - run.since, answers=not self._fleet.silent(member, now))
            for member in self._fleet.members.values()
            for _, run in member.wanted()
        ]
        slow = overdue(running, work.seconds)
        barred = {index: work.ledger.runners(index) for index in slow}
        room = self._fleet.room(work.ledger.version, now)
        for index, name in assign(slow, room, self._fleet.capacity, barred):
            self._note("group_duplicated", step=work.ledger.step, group=index, slow=barred[index], worker=name)
            work.ledger.duplicate(index, name)
            self._give(work, index, name)

    def _give(self, work: Work, index: int, name: str) -> None:
        member, call = self._fleet.members[name], next(self._calls)
        member.runs[call] = Run(index, work.ledger.step)
        ref = member.actor.generate.remote(work.tasks[index], call)
        self._fleet.inbox.expect(ref, partial(self._on_group, work, member, call))

    def _on_group(self, work: Work, member: Member, call: int, future: "Future[Any]") -> None:
        run = member.runs.pop(call, None)
        if run is None:  # its worker was dropped before
            return
        member.heard = time.monotonic()
        if run.wanted:
            self._take(work, member, run, future)

    def _take(self, work: Work, member: Member, run: Run, future: "Future[Any]") -> None:
        """Count a group that came back; a worker that failed with it is replaced, and the group runs again."""
        copies = work.ledger.runners(run.index)
        try:
            group = calls.outcome(future, actor=member.name, what=f"step {run.step} group {run.index}")
            work.ledger.generated(group)
        except WorkerLost as error:
            self._fleet.drop(member, error)
        except InputError as error:  # it would be the same everywhere
            self._fatal = error
        except RaylignError as error:
            again = [run.index] if work.ledger.failed(run.index, member.name) else []
            self._fleet.drop(member, error)
            self._give_again(work, again, error)
        else:
            work.seconds.append(time.monotonic() - run.since)
            self._yielded[prompt_key(group)] = max((len(s.tokens) for s in group.samples), default=0)
            self._done.append(group)
            self._abandon_copies(run.index, [name for name in copies if name != member.name])

    def _abandon_copies(self, index: int, workers: Sequence[str]) -> None:
        for member in map(self._fleet.members.__getitem__, workers):
            self._abandon(member, [call for call, run in member.wanted() if run.index == index])

    def _abandon(self, member: Member, open_calls: Sequence[int]) -> None:
        for call in open_calls:
            member.runs[call].wanted = False
            member.actor.abort.remote(call)

    def _on_lost(self, member: Member, error: RaylignError) -> list[int]:
        """What a lost worker alone was running is pending again."""
        member.runs.clear()
        if self._work is None:
            return []
        again = self._work.ledger.lost(member.name)
        self._give_again(self._work, again, error)
        return again

    def _give_again(self, work: Work, indices: Sequence[int], error: RaylignError) -> None:
        work.again(indices)
        for index in indices:
            if why := give_up(work.ledger, index, str(error)):
                self._fatal = RunFailed(why)
