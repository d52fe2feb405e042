"""The rollout workers themselves: as many as are asked for, alive, and on weights that they have proved.

One thread, and no call on a worker is waited for by itself: every answer and every death comes through one inbox, and
who is late is found by the clock. So no worker holds up another.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..cluster import calls
from ..cluster.calls import Wait
from ..cluster.errors import DoesNotFit, InputError, RaylignError, RunFailed, WorkerLost
from ..cluster.placement import missing, node_of
from ..cluster.weights import WeightVersion
from .inbox import LOOK_SECONDS, Inbox
from .member import Member, Stage, begin, waits
from .places import Places
from .pool_rules import MAX_FAILURES, Holder, moves, pause
from .worker import WorkerSpec

LOAD_SECONDS = 1800.0
"""How long a worker may take to load its model once it has a place."""

BEAT_SECONDS = 2.0
"""How often a worker gives a sign of life, at least."""

PATIENCE_SECONDS = 5.0
"""A worker that is silent for longer is not counted on, though it may come back."""

Note = Callable[..., None]
"""Told what happened: `note(kind, **fields)`."""

OnLost = Callable[[Member, RaylignError], list[int]]
"""Told that a worker is gone; gives the groups that run again elsewhere."""


class Fleet:
    """Keeps `target` workers, and has each prove the weights that it is to hold. `role` is the class of their actors.

    `fatal` is set when that cannot go on; whoever waits for workers raises it.
    """

    def __init__(
        self,
        prefix: str,
        spec: WorkerSpec,
        role: type,
        *,
        wait_seconds: float,
        note: Note,
        on_lost: OnLost,
        places: Places | None = None,
    ) -> None:
        self._prefix, self._spec, self._role = prefix, spec, role
        self._places = places or Places()
        self._wait_seconds, self._note, self._on_lost = wait_seconds, note, on_lost
        health = spec.config.health_seconds
        self._beat, self._patience = min(BEAT_SECONDS, health / 4), min(PATIENCE_SECONDS, health / 2)
        self.inbox = Inbox()
        self.members: dict[str, Member] = {}
        """In the order of their start."""
        self._proved = self._refused = -1
        """The newest version that any worker has proved, and that any has refused."""
        self._started = self._failed_starts = 0
        self._join_after = self._look_after = 0.0
        self.fatal: RaylignError | None = None
        self.restarts = 0
        self.capacity = max(1, spec.config.slots // spec.config.group_size)
        """Groups that a worker has at once."""
        self.target = spec.config.workers.start

    def ready(self) -> list[Member]:
        """Workers that have proved a version and are not leaving."""
        return [m for m in self.members.values() if m.stage is Stage.WORKING and not m.draining]

    def silent(self, member: Member, now: float) -> bool:
        """Whether a worker is not to be counted on now."""
        return member.silent(now, self._patience)

    def room(self, weights: WeightVersion, now: float) -> dict[str, int]:
        """Workers that can take a group from a version now, with how many they have."""
        free = [m for m in self.members.values() if len(m.runs) < self.capacity]  # few of many, so asked first
        able = (m for m in free if m.stage is Stage.WORKING and not m.draining and not self.silent(m, now))
        return {m.name: len(m.runs) for m in able if m.holds(weights)}

    def all_hold(self, weights: WeightVersion) -> bool:
        """Whether every worker has these weights or is about to prove them: so it is most of the time."""
        return all((m.asked or m.proved) is weights for m in self.members.values())

    def holders(self, now: float) -> list[Holder]:
        """Those that have a model, and the version that each has or is about to prove."""
        loaded = (m for m in self.members.values() if m.stage in (Stage.PROVING, Stage.WORKING) and not m.draining)
        return [
            Holder(m.name, m.asked or m.proved, len(m.wanted()), m.asked is not None, self.silent(m, now))
            for m in loaded
        ]

    def held_up(self) -> bool:
        """Whether those still missing may take long: they find no place, or could not start."""
        return self._failed_starts > 0 or all(m.overdue for m in self._coming())

    def refuse_to_wait_for_places(self, least: int) -> None:
        """Raise `DoesNotFit` when there are fewer workers than the least and all that could come lack a place."""
        coming = self._coming()
        if len(self.ready()) < least and coming and all(m.overdue for m in coming):
            reason = missing(coming[0].name, self._spec.config.resources, self._wait_seconds, coming[0].bounds)
            raise DoesNotFit(f"{reason}. Free some or add a node")

    def ask(self, name: str, weights: WeightVersion) -> None:
        """Have a worker prove weights, and generate from them then; one that still proves others is not to be asked."""
        member = self.members[name]
        member.asked, member.asked_at = weights, time.monotonic()
        self.inbox.expect(member.actor.set_weights.remote(weights), partial(self._on_proved, member, weights))

    def look(self) -> bool:
        """Look at the clock and at how many workers there are, unless that was just done; whether it was due."""
        now = time.monotonic()
        if now < self._look_after:
            return False
        self._look_after = now + LOOK_SECONDS
        for member in list(self.members.values()):
            if member.stage is Stage.PLACING:
                self._look_for_place(member, now)
            elif late := self._late(member, now):
                self.drop(member, WorkerLost(late))
        self.reconcile()
        return True

    def reconcile(self) -> None:
        """Move towards the target: start what is missing, drain what is too much, end what has drained."""
        due = moves(self.target, [m.name for m in self.ready()], [m.name for m in self._coming()])
        for _ in range(due.start if time.monotonic() >= self._join_after else 0):
            self._begin_join()
        for name in due.drain:
            self.members[name].draining = True
            self._note("worker_draining", worker=name)
        drained = [m.name for m in self.members.values() if m.draining and not m.wanted()]
        for name in (*due.unwanted, *drained):
            self._remove(self.members[name])
            self._note("worker_left", worker=name)

    def drop(self, member: Member, error: RaylignError) -> None:
        """A worker died, is late or raised: replace it."""
        if self.members.get(member.name) is not member:
            return
        self._remove(member)
        if member.stage is Stage.WORKING:
            self._lose(member, error)
        else:
            self._start_failed(member, error)
        self.reconcile()

    def waiting(self) -> list[Wait]:
        """What is waited for from each worker now."""
        return [wait for m in self.members.values() for wait in waits(m, self._spec, patience=self._patience)]

    def close(self) -> None:
        """End every worker, those on their way too."""
        for member in list(self.members.values()):
            self._remove(member)

    # ---- joining

    def _coming(self) -> list[Member]:
        return [m for m in self.members.values() if m.stage is not Stage.WORKING]

    def _begin_join(self) -> None:
        name = f"{self._prefix}rollout-{self._started}"
        self._started += 1
        self._note("worker_joining", worker=name)
        # besides its groups a worker may have weights to load, groups to abort and a sign of life to give
        member = self.members[name] = begin(
            name, self._spec, self._role, self._places.bounds(name), concurrency=self.capacity + 4
        )
        self.inbox.expect(member.actor.build.remote(), partial(self._on_built, member))

    def _look_for_place(self, member: Member, now: float) -> None:
        """Note when a worker gets its place, and, once, that it has waited too long for one: the wish stands."""
        if node := node_of(member.placement):
            self._stands(member, node)
            member.enter(Stage.LOADING)
        elif member.bounds != self._places.bounds(member.name):
            self._remove(member)  # whom it is to follow has moved: another is asked for elsewhere
        elif now - member.since > self._wait_seconds and not member.overdue:
            member.overdue = True
            reason = missing(member.name, self._spec.config.resources, self._wait_seconds, member.bounds)
            self._note("worker_waiting", worker=member.name, reason=reason)

    def _stands(self, member: Member, node: str) -> None:
        member.node = node
        self._places.stands(member.name, node)

    def _on_built(self, member: Member, future: "Future[Any]") -> None:
        if not self._hear(member, future, "loading the model"):
            return
        self._stands(member, member.node or node_of(member.placement) or "")
        member.enter(Stage.PROVING)
        self._keep_in_touch(member)

    def _start_failed(self, member: Member, error: RaylignError) -> None:
        """Count a start that failed; where no worker works and trying again would not help, it is fatal."""
        self._failed_starts += 1
        self._note("worker_failed", worker=member.name, reason=str(error))
        self._join_after = time.monotonic() + pause(self._failed_starts)
        if (self._failed_starts >= MAX_FAILURES or isinstance(error, InputError)) and not self.ready():
            self.fatal = error

    # ---- weights

    def _on_proved(self, member: Member, weights: WeightVersion, future: "Future[Any]") -> None:
        if not self._hear(member, future, f"loading weight version {weights.version}"):
            return
        if (digest := future.result()) != weights.digest:
            self.drop(member, RunFailed(f"{member.name} holds weights {digest[:12]}, not {weights.digest[:12]}"))
            return
        member.proved, member.asked = weights, None
        self._proved = max(self._proved, weights.version)
        if member.stage is Stage.PROVING:
            member.enter(Stage.WORKING)
            self._failed_starts = 0
            self._note("worker_joined", worker=member.name, version=member.version)

    # ---- signs of life, and losses

    def _keep_in_touch(self, member: Member) -> None:
        """Keep one call open on the worker: it ends at once when the worker dies, and in time while it lives."""
        self.inbox.expect(member.actor.stay.remote(self._beat), partial(self._on_stayed, member))

    def _on_stayed(self, member: Member, future: "Future[Any]") -> None:
        if self._hear(member, future, "its idle time"):
            self._keep_in_touch(member)

    def _hear(self, member: Member, future: "Future[Any]", what: str) -> bool:
        """Whether a call on a worker that is still wanted ended well; one whose call did not is dropped."""
        if self.members.get(member.name) is not member:
            return False
        member.heard = time.monotonic()
        try:
            calls.outcome(future, actor=member.name, what=what)
        except RaylignError as error:
            self.drop(member, error)
            return False
        return True

    def _late(self, member: Member, now: float) -> str | None:
        """What a worker has not done in time, or that it is where it may not be."""
        limit = self._spec.config.timeout_seconds
        if member.stage is Stage.LOADING and now - member.since > LOAD_SECONDS:
            return f"{member.name} did not finish loading the model within {LOAD_SECONDS:.0f} s"
        if member.asked is not None and now - member.asked_at > limit:
            return f"{member.name} did not prove weight version {member.asked.version} within {limit:.0f} s"
        if member.silent(now, self._spec.config.health_seconds):
            return f"{member.name} gave no sign of life for {now - member.heard:.0f} s"
        if not self._places.bounds(member.name).allow(member.node):
            return f"{member.name} stands on {member.node}, where its role may not stand any more"
        late = [run.index for run in member.runs.values() if now - run.since > limit]
        return f"{member.name} had group {late[0]} for more than {limit:.0f} s" if late else None

    def _lose(self, member: Member, error: RaylignError) -> None:
        again = self._on_lost(member, error)
        self.restarts += 1
        self._note("worker_lost", worker=member.name, reason=str(error), groups=again)
        if member.asked is not None and not isinstance(error, WorkerLost):
            self._refused = max(self._refused, member.asked.version)
        if self._refused > self._proved and not self.ready():
            self.fatal = RunFailed(f"every rollout worker refuses weight version {self._refused}, lastly: {error}")

    def _remove(self, member: Member) -> None:
        del self.members[member.name]
        self._places.left(member.name)
        member.end()
