"""The elastic pool: rollout workers that join, leave and die while groups go on being generated.

It decides who gets which group; what a group yields depends on its seed key alone, so the result is the same for any
number of workers and any of their deaths.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cluster import calls
from ..cluster.errors import DoesNotFit, InputError, RaylignError, RunFailed, WorkerLost
from ..cluster.placement import place, release
from ..cluster.weights import WeightVersion
from .ledger import GroupState, Ledger
from .pool_rules import MAX_FAILURES, assign, give_up, moves, pause
from .records import Group
from .worker import RolloutActor, WorkerSpec

CLOSE_SECONDS = 15.0
"""How long `close` waits for workers on their way to notice that they are not wanted."""

Note = Callable[..., None]
"""Told what happened: `note(kind, **fields)`."""


@dataclass(slots=True)
class Member:
    """A worker that has proved its weights."""

    name: str
    actor: Any
    placement: Any
    version: int = -1
    """The weight version it has proved last; none yet is -1."""
    draining: bool = False
    running: dict[Any, tuple[int, float]] = field(default_factory=dict)
    """Reference of a call → the group's index and when it was dispatched."""


class RolloutPool:
    """Keeps `target` workers, gives them groups, and replaces the lost. One thread calls it."""

    def __init__(self, *, prefix: str, spec: WorkerSpec, wait_seconds: float, note: Note) -> None:
        self._prefix, self._spec, self._wait_seconds, self._note = prefix, spec, wait_seconds, note
        self._members: dict[str, Member] = {}
        self._joining: dict[str, Any] = {}
        """Name → actor, or None before it is placed; in the order of their start."""
        self._unwanted: set[str] = set()
        self._arrivals: queue.SimpleQueue[tuple[str, Member | RaylignError]] = queue.SimpleQueue()
        self._weights: WeightVersion | None = None
        self._started = 0
        self._failed_starts = 0
        self._join_after = 0.0
        self._last_loss = ""
        self.restarts = 0
        self.target = spec.config.workers.start

    @property
    def size(self) -> int:
        """Workers that take groups now."""
        return sum(not m.draining for m in self._members.values())

    def start(self, weights: WeightVersion, *, tick: Callable[[], None]) -> None:
        """Bring up the first workers with a version; those that find no place beyond the least are not waited for.

        Raises `RunFailed` or `DoesNotFit` when they cannot be had.
        """
        self._weights = weights
        self._reconcile()
        while self.size < self.target and not (self._failed_starts and self.size >= self._spec.config.workers.min):
            tick()
            self._admit(timeout=0.2)
            self._reconcile()

    def scale(self, target: int) -> int:
        """Ask for another number of workers, within the recipe's bounds; returns what is asked for now."""
        bounds = self._spec.config.workers
        self.target = min(max(target, bounds.min), bounds.max)
        self._reconcile()
        return self.target

    def advance(self) -> None:
        """Take in who has arrived and move on towards the target; for the phases in which nothing is generated."""
        self._admit(timeout=0)
        self._reconcile()

    def set_weights(self, weights: WeightVersion) -> None:
        """Give every worker a new version and have each prove its digest; one that does not is replaced.

        Raises `RunFailed` when all of them refuse it: then the version is wrong, not a worker.
        """
        self._weights = weights
        refs = {m.name: m.actor.set_weights.remote(weights) for m in self._members.values()}
        refused = 0
        for name, ref in refs.items():
            try:
                self._prove(self._members[name], ref, weights)
            except RaylignError as error:
                refused += not isinstance(error, WorkerLost)
                if refused == len(refs):
                    raise RunFailed(
                        f"every rollout worker refuses weight version {weights.version}, lastly: {error}"
                    ) from error
                self._lose(self._members[name], str(error), None)
        self.advance()

    def generate(self, groups: list[Group], ledger: Ledger, *, tick: Callable[[], None]) -> Iterator[Group]:
        """Yield each group once, with its completions, as it is done. `tick` is called at least twice a second.

        Raises `RunFailed` when no worker is left and none can come, or a group fails everywhere.
        """
        import ray

        weights = self._weights
        assert weights is not None, "start() gives the first weights"
        tasks = {g.index: replace(g, version=weights.version, digest=weights.digest) for g in groups}
        while not ledger.complete(GroupState.GENERATED):
            tick()
            self.advance()
            self._dispatch(tasks, ledger)
            refs = [ref for m in self._members.values() for ref in m.running]
            if not refs:
                self._admit(timeout=0.2)
                continue
            done, _ = ray.wait(refs, num_returns=1, timeout=0.3)
            more = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if done else []
            for ref in more:
                yield from self._collect(ref, ledger)
            self._check_deadlines(ledger)

    def close(self) -> None:
        """End every worker, those on their way too."""
        for member in list(self._members.values()):
            self._remove(member)
        self._unwanted.update(self._joining)
        give_up = time.monotonic() + CLOSE_SECONDS
        while self._joining and time.monotonic() < give_up:
            calls.end([actor for actor in list(self._joining.values()) if actor is not None])
            self._admit(timeout=0.2)

    def _dispatch(self, tasks: dict[int, Group], ledger: Ledger) -> None:
        """Give each pending group to the worker with the fewest, as far as its slots go."""
        pending = ledger.pending()
        for index in pending:
            if why := give_up(ledger, index, self._last_loss):
                raise RunFailed(why)
        load = {m.name: len(m.running) for m in self._members.values() if not m.draining}
        for index, name in assign(pending, load, self._capacity()):
            member = self._members[name]
            ledger.dispatch(index, name)
            member.running[member.actor.generate.remote(tasks[index])] = (index, time.monotonic())

    def _capacity(self) -> int:
        """Groups that a worker has at once."""
        return max(1, self._spec.config.slots // self._spec.config.group_size)

    def _collect(self, ref: Any, ledger: Ledger) -> Iterator[Group]:
        member = next((m for m in self._members.values() if ref in m.running), None)
        if member is None:  # its worker was lost while an earlier result was taken in
            return
        index, _ = member.running.pop(ref)
        try:
            group = calls.get(ref, actor=member.name, what=f"step {ledger.step} group {index}", timeout=30)
        except RunFailed as error:
            own = not isinstance(error, WorkerLost)
            if own:
                ledger.failed(index)
            self._lose(member, str(error), ledger, failed=[index] if own else [])
            return
        if ledger.generated(group):
            yield group

    def _check_deadlines(self, ledger: Ledger) -> None:
        limit = self._spec.config.timeout_seconds
        for member in list(self._members.values()):
            late = [i for i, since in member.running.values() if time.monotonic() - since > limit]
            if late:
                self._lose(member, f"{member.name} had group {late[0]} for more than {limit:.0f} s", ledger)

    def _reconcile(self) -> None:
        """Move towards the target: start what is missing, drain what is too much, end what has drained."""
        ready = [m.name for m in self._members.values() if not m.draining]
        due = moves(self.target, ready, [name for name in self._joining if name not in self._unwanted])
        for _ in range(due.start if time.monotonic() >= self._join_after else 0):
            self._begin_join()
        self._unwanted.update(due.unwanted)
        for name in due.drain:
            self._members[name].draining = True
            self._note("worker_draining", worker=name)
        for member in [m for m in self._members.values() if m.draining and not m.running]:
            self._remove(member)
            self._note("worker_left", worker=member.name)

    def _begin_join(self) -> None:
        name = f"{self._prefix}rollout-{self._started}"
        self._started += 1
        self._joining[name] = None
        self._note("worker_joining", worker=name)
        self._in_thread(name, None)

    def _in_thread(self, name: str, member: Member | None) -> None:
        threading.Thread(target=self._join, args=(name, member), name=f"join {name}", daemon=True).start()

    def _join(self, name: str, member: Member | None) -> None:
        """Place and start one worker and have it prove the newest weights, or just the last for one that is there.

        Off the loop's thread: it takes seconds and must not hold up a step.
        """
        placement = member.placement if member else None
        try:
            if member is None:
                placement = self._place(name)
                member = self._begin(name, placement)
            while (weights := self._weights) and member.version != weights.version:
                self._prove(member, member.actor.set_weights.remote(weights), weights)
            self._arrivals.put((name, member))
        except Exception as error:  # noqa: BLE001  the loop's thread decides what it means; here nobody would hear of it
            if actor := self._joining.get(name):
                calls.end([actor])
            if placement is not None:
                release(placement)
            known = isinstance(error, RaylignError)
            self._arrivals.put((name, error if known else WorkerLost(f"{name} could not start: {error!r}")))

    def _place(self, name: str) -> Any:
        resources = self._spec.config.resources
        return place(name, resources, timeout=self._wait_seconds, cancelled=lambda: name in self._unwanted)

    def _begin(self, name: str, placement: Any) -> Member:
        """Start a worker's actor and its engine. Raises what the engine raises, `WorkerLost` when the actor dies."""
        actor = self._create(name, placement)
        self._joining[name] = actor
        calls.get(actor.build.remote(), actor=name, what="loading the model", timeout=self._wait_seconds)
        return Member(name=name, actor=actor, placement=placement)

    def _create(self, name: str, placement: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        config = self._spec.config
        return (
            ray.remote(RolloutActor)
            .options(
                name=name,
                num_cpus=config.resources.cpus,
                num_gpus=config.resources.gpus,
                max_concurrency=self._capacity() + 2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
            )
            .remote(name, self._spec)
        )

    def _prove(self, member: Member, ref: Any, weights: WeightVersion) -> None:
        """Wait until a worker has a version. Raises `WorkerLost`, or what the worker raises on a wrong digest."""
        digest = calls.get(
            ref, actor=member.name, what=f"loading weight version {weights.version}", timeout=self._wait_seconds
        )
        if digest != weights.digest:
            raise RunFailed(f"{member.name} holds weights {digest[:12]}, not {weights.digest[:12]}")
        member.version = weights.version

    def _admit(self, timeout: float) -> None:
        """Take in a worker that has joined; one that is a version behind is sent to catch up, and not waited for."""
        try:
            name, arrival = self._arrivals.get(timeout=timeout) if timeout else self._arrivals.get_nowait()
        except queue.Empty:
            return
        behind = isinstance(arrival, Member) and self._weights and arrival.version != self._weights.version
        if isinstance(arrival, Member) and behind and name not in self._unwanted:
            self._in_thread(name, arrival)
            return
        del self._joining[name]
        if name in self._unwanted:
            self._turn_away(name, arrival)
        elif isinstance(arrival, RaylignError):
            self._start_failed(name, arrival)
        else:
            self._members[name] = arrival
            self._failed_starts = 0
            self._note("worker_joined", worker=name, version=arrival.version)

    def _start_failed(self, name: str, error: RaylignError) -> None:
        """Count a start that failed. Raises its error where no worker works and trying again would not help."""
        self._failed_starts += 1
        self._note("worker_failed", worker=name, reason=str(error))
        self._join_after = time.monotonic() + pause(self._failed_starts)
        placed = any(actor is not None for actor in self._joining.values())
        hopeless = self._failed_starts >= MAX_FAILURES or isinstance(error, InputError)
        if (hopeless or (isinstance(error, DoesNotFit) and not placed)) and not self._members:
            raise error

    def _turn_away(self, name: str, arrival: "Member | RaylignError") -> None:
        """One that was asked for no longer has arrived, or has given up."""
        self._unwanted.discard(name)
        if isinstance(arrival, Member):
            calls.end([arrival.actor])
            release(arrival.placement)
        self._note("worker_left", worker=name)

    def _lose(self, member: Member, reason: str, ledger: Ledger | None, failed: Sequence[int] = ()) -> None:
        """Replace a worker; its groups and those that `failed` on it run again elsewhere."""
        again = sorted([*failed, *(ledger.lost(member.name) if ledger else [])])
        self._remove(member)
        self.restarts += 1
        self._last_loss = reason
        self._note("worker_lost", worker=member.name, reason=reason, groups=again)

    def _remove(self, member: Member) -> None:
        del self._members[member.name]
        calls.end([member.actor])
        release(member.placement)
