"""The elastic pool: groups are generated while rollout workers join, leave, hang and die.

Several steps may be under way, each from weights of its own: a worker that has nothing left to do for one goes over to
the next, and nobody waits for the others. The pool decides who gets which group; what a group yields depends on its
seed key and its weights alone, so the result is the same for any number of workers, any of their deaths, and whoever is
first with a group that two of them run.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..cluster import calls
from ..cluster.calls import Wait
from ..cluster.errors import InputError, RaylignError, RunFailed, WorkerLost
from ..cluster.weights import WeightVersion
from .fleet import Fleet, Note
from .inbox import LOOK_SECONDS, Inbox
from .ledger import GroupState, Ledger
from .member import Member, Run
from .places import Places
from .pool_rules import Running, assign, give_up, longest_first, new_weights, overdue, prompt_key
from .records import Group
from .worker import RolloutActor, WorkerSpec

Tick = Callable[[], None]
"""Called at least twice a second during a wait; what it raises ends the wait."""


@dataclass(slots=True)
class Work:
    """Groups of a step under way; all come from the same weights."""

    ledger: Ledger
    weights: WeightVersion
    then: Callable[[Group], None]
    """Given each group as it is done, once."""
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
        self._works: list[Work] = []
        """In the order in which they began, the oldest step first."""
        self._newest: WeightVersion | None = None
        self._yielded: dict[int, int] = {}
        """Prompt → tokens of the longest completion it gave the last time."""
        self._calls = itertools.count()
        self._fatal: RaylignError | None = None

    @property
    def inbox(self) -> Inbox:
        """Where answers arrive; who waits in it for other actors lets the pool hear its own."""
        return self._fleet.inbox

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

    def prepare(self) -> None:
        """Begin the first workers: while there are no weights yet they load their models, and `start` waits less."""
        self._fleet.reconcile()

    def start(self, weights: WeightVersion, *, tick: Tick) -> None:
        """Bring up the first workers with a version; those that find no place beyond the least are not waited for.

        Raises `RunFailed` or `DoesNotFit` when they cannot be had.
        """
        self.set_weights(weights)
        self.prepare()
        while self.size < self.target and not (self.size >= self._bounds.min and self._fleet.held_up()):
            self._turn(tick, least=self._bounds.min)

    def scale(self, target: int) -> int:
        """Ask for another number of workers, within the recipe's bounds; returns what is asked for now."""
        self._fleet.target = min(max(target, self._bounds.min), self._bounds.max)
        self._fleet.reconcile()
        return self.target

    def advance(self) -> None:
        """Take in what has come and move on, without waiting; whoever waits for something else calls it often."""
        self._move_on(0)

    def turn(self, tick: Tick) -> None:
        """Wait shortly for what comes and move on. Raises `RunFailed` or `DoesNotFit` when no worker is left and none
        can come, a group fails everywhere, or all workers refuse a version: then that is wrong, not a worker.
        """
        self._turn(tick)

    def set_weights(self, weights: WeightVersion) -> None:
        """Have workers prove a version as soon as no group of another needs them, those that join at once.

        Who has not proved it is given no groups from it, who does not in time is replaced.
        """
        self._newest = weights
        self._dispatch()

    def begin(
        self, groups: Sequence[Group], ledger: Ledger, weights: WeightVersion, then: Callable[[Group], None]
    ) -> None:
        """Have groups generated from these weights while `advance` and `turn` are called; `then` gets each once, with
        its completions, as it is done, and must not raise. Those of a step that began before come first.
        """
        if (weights.version, weights.digest) != (ledger.version, ledger.digest):
            raise RunFailed(
                f"step {ledger.step} is to come from weight version {ledger.version}, not {weights.version}"
            )
        tasks = {g.index: replace(g, version=ledger.version, digest=ledger.digest) for g in groups}
        order = list(enumerate(longest_first(groups, self._yielded)))
        rank = {index: place for place, index in order}
        self._works.append(Work(ledger, weights, then, tasks, rank=rank, pending=order))
        self._dispatch()

    def withdraw(self) -> None:
        """Give up all groups that are not done."""
        self._works.clear()
        for member in self._fleet.members.values():
            self._abandon(member, [call for call, _ in member.wanted()])

    def waiting(self) -> list[Wait]:
        """What is waited for from each worker now."""
        return self._fleet.waiting()

    def close(self) -> None:
        """End every worker, those on their way too."""
        self._fleet.close()

    def _move_on(self, seconds: float) -> None:
        """Take in what comes within some seconds, and give out what there is room for."""
        self._fleet.inbox.take(seconds)
        if self._fleet.look():
            self._duplicate(time.monotonic())
        self._dispatch()

    def _turn(self, tick: Tick, least: int = 1) -> None:
        tick()
        self._move_on(LOOK_SECONDS)
        if error := self._fatal or self._fleet.fatal:
            raise error
        self._fleet.refuse_to_wait_for_places(least)

    def _dispatch(self) -> None:
        """Give each pending group, the oldest step's and then the longest expected first, to the worker with the fewest
        that has its weights, as far as slots go."""
        now, capacity = time.monotonic(), self._fleet.capacity
        for work in self._works:
            if work.pending:
                room = self._fleet.room(work.weights, now)
                free = sum(capacity - count for count in room.values())
                for index, name in assign(work.first(free), room, capacity):
                    work.ledger.dispatch(index, name)
                    self._give(work, index, name)
        self._renew(now)

    def _renew(self, now: float) -> None:
        """Have workers without groups prove the weights that are asked of them next."""
        newest = self._newest
        if newest is None or (self._fleet.all_hold(newest) and all(work.weights is newest for work in self._works)):
            return
        needs: dict[int, tuple[WeightVersion, int]] = {}
        for work in self._works:
            before = needs.get(work.weights.version, (work.weights, 0))[1]
            needs[work.weights.version] = (work.weights, before + len(work.pending))
        found = new_weights(list(needs.values()), self._fleet.holders(now), self._fleet.capacity, newest)
        for name, weights in found.items():
            self._fleet.ask(name, weights)

    def _duplicate(self, now: float) -> None:
        """Where a step has nothing left to give out, have its groups that take long run on another worker too."""
        for work in self._works:
            if not work.pending:
                self._duplicate_of(work, now)

    def _duplicate_of(self, work: Work, now: float) -> None:
        running = [
            Running(run.index, now - run.since, answers=not self._fleet.silent(member, now))
            for member in self._fleet.members.values()
            for _, run in member.wanted()
            if run.ledger is work.ledger
        ]
        slow = overdue(running, work.seconds)
        barred = {index: work.ledger.runners(index) for index in slow}
        room = self._fleet.room(work.weights, now)
        for index, name in assign(slow, room, self._fleet.capacity, barred):
            self._note("group_duplicated", step=work.ledger.step, group=index, slow=barred[index], worker=name)
            work.ledger.duplicate(index, name)
            self._give(work, index, name)

    def _give(self, work: Work, index: int, name: str) -> None:
        member, call = self._fleet.members[name], next(self._calls)
        member.runs[call] = Run(work.ledger, index)
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
            group = calls.outcome(future, actor=member.name, what=f"{run.ledger.title} group {run.index}")
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
            self._abandon_copies(run, [name for name in copies if name != member.name])
            if work.ledger.complete(GroupState.GENERATED):
                self._works.remove(work)
            work.then(group)

    def _abandon_copies(self, done: Run, workers: Sequence[str]) -> None:
        for member in map(self._fleet.members.__getitem__, workers):
            same = [c for c, run in member.wanted() if run.ledger is done.ledger and run.index == done.index]
            self._abandon(member, same)

    def _abandon(self, member: Member, open_calls: Sequence[int]) -> None:
        for call in open_calls:
            member.runs[call].wanted = False
            member.actor.abort.remote(call)

    def _on_lost(self, member: Member, error: RaylignError) -> list[int]:
        """What a lost worker alone was running is pending again."""
        member.runs.clear()
        lost: list[int] = []
        for work in self._works:
            again = work.ledger.lost(member.name)
            self._give_again(work, again, error)
            lost += again
        return lost

    def _give_again(self, work: Work, indices: Sequence[int], error: RaylignError) -> None:
        work.again(indices)
        for index in indices:
            if why := give_up(work.ledger, index, str(error)):
                self._fatal = RunFailed(why)
