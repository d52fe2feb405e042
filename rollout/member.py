"""A rollout worker as the pool sees it: its place, what it has proved, what it runs, when it was last heard."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..cluster import calls
from ..cluster.calls import Wait
from ..cluster.placement import ANYWHERE, Bounds, free, release, reserve
from ..cluster.planning import amount
from ..cluster.weights import WeightVersion
from .ledger import Ledger
from .worker import WorkerSpec


class Stage(StrEnum):
    """How far a worker is on its way; it takes groups from the last stage on."""

    PLACING = "placing"
    LOADING = "loading"
    PROVING = "proving"
    WORKING = "working"


@dataclass(slots=True, eq=False)
class Run:
    """One call for one group."""

    ledger: Ledger
    """That the group is counted in."""
    index: int
    since: float = field(default_factory=time.monotonic)
    wanted: bool = True
    """Whether its result still counts; one that does not has been aborted, and takes up room until it answers."""


@dataclass(slots=True, eq=False)
class Member:
    """One worker from the wish for it to its end. All moments are of the monotonic clock."""

    name: str
    actor: Any
    placement: Any
    bounds: Bounds = ANYWHERE
    """Where it was asked for."""
    stage: Stage = Stage.PLACING
    since: float = field(default_factory=time.monotonic)
    """When it came into its stage."""
    node: str = ""
    proved: WeightVersion | None = None
    """The weights it has proved last."""
    asked: WeightVersion | None = None
    """Those it has been asked to prove and has not answered for."""
    asked_at: float = 0.0
    heard: float = 0.0
    """When anything came from it last; it counts from the moment it is loaded."""
    draining: bool = False
    overdue: bool = False
    """Whether it has been said that it waits too long for a place."""
    runs: dict[int, Run] = field(default_factory=dict)
    """Its open calls by number."""

    @property
    def version(self) -> int:
        """The number of the weights it has proved last; none yet is -1."""
        return self.proved.version if self.proved else -1

    def holds(self, weights: WeightVersion) -> bool:
        """Whether these weights are what it generates from now."""
        has = self.proved
        return self.asked is None and has is not None and (has.version, has.digest) == (weights.version, weights.digest)

    def enter(self, stage: Stage) -> None:
        """Come into the next stage."""
        self.stage, self.since = stage, time.monotonic()

    def wanted(self) -> list[tuple[int, Run]]:
        """Its calls whose results still count."""
        return [(call, run) for call, run in self.runs.items() if run.wanted]

    def silent(self, now: float, patience: float) -> bool:
        """Whether nothing has come from a loaded worker for more than `patience` seconds."""
        return self.stage in (Stage.PROVING, Stage.WORKING) and now - self.heard > patience

    def end(self) -> None:
        """Kill its process and give its place back."""
        calls.end([self.actor])
        release(self.placement)


def begin(name: str, spec: WorkerSpec, role: type, bounds: Bounds, *, concurrency: int) -> Member:
    """Ask for a place within the bounds and an actor of class `role` in it as soon as there is one; returns at once."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = spec.config.resources
    placement = reserve(name, resources, bounds)
    actor = ray.remote(role).options(
        name=name,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_concurrency=concurrency,
        runtime_env={"py_executable": spec.config.python} if spec.config.python else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
    )
    return Member(name=name, actor=actor.remote(name, spec), placement=placement, bounds=bounds)


def waits(member: Member, spec: WorkerSpec, *, patience: float) -> list[Wait]:
    """What is waited for from a worker now; one that says nothing for `patience` seconds is named as such."""
    now = time.monotonic()

    def wait(what: str, since: float) -> Wait:
        return Wait(what, member.name, member.node, calls.epoch(since))

    found = [wait(f"{run.ledger.title} group {run.index}", run.since) for _, run in member.wanted()]
    if member.stage is Stage.PLACING:
        asked = amount(spec.config.resources.cpus, spec.config.resources.gpus)
        found.append(wait(f"a place with {asked}{member.bounds} ({free()})", member.since))
    if member.stage is Stage.LOADING:
        found.append(wait("loading the model", member.since))
    if member.asked is not None:
        found.append(wait(f"loading weight version {member.asked.version}", member.asked_at))
    if member.silent(now, patience):
        found.append(wait("a sign of life", member.heard))
    return found
