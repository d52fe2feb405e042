"""The actors of an online stage besides the rollout pool: policy, reference and reward."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import Resources
from ...cluster.placement import amount, node_of, place, release
from ...cluster.weights import WeightVersion
from ...rollout.records import Group
from ..stages import OnlineStage
from .batch import TrainSample
from .policy import PolicyActor, PolicySpec, ReferenceActor
from .samples import write_samples

LOAD_SECONDS = 1800.0
"""How long an actor may take to load its model or its rewards once it has a place."""

_STATELESS = {"max_restarts": 3, "max_task_retries": 3}
"""Ray starts these again elsewhere and repeats the call: what they answer depends on what they are asked alone."""

Tick = Callable[[], None]
"""Called at least twice a second during a wait; what it raises ends the wait."""


class Roles:
    """Starts the actors of a stage under names that `ray list actors` shows, and waits for what they do.

    Waiting raises `WorkerLost`, which names the actor and what it was doing, after the stage's `timeout_seconds`. The
    `tick` of waits that change the policy or the weights (update, publish, save) must not end them: a stop in the
    middle would leave step and weights apart.
    """

    def __init__(
        self, prefix: str, spec: PolicySpec, stage: OnlineStage, *, samples: Path, wait_seconds: float
    ) -> None:
        self._prefix, self._spec, self._stage, self._samples = prefix, spec, stage, samples
        self._timeout, self._wait_seconds = stage.timeout_seconds, wait_seconds
        self._placements: list[Any] = []
        self._actors: dict[str, Any] = {}
        self._scorers: list[str] = []
        self._nodes: dict[str, str] = {}
        self._waits: list[Wait] = []

    def waiting(self) -> list[Wait]:
        """What is waited for from an actor now."""
        return list(self._waits)

    @contextmanager
    def _waiting(self, name: str, what: str) -> Iterator[None]:
        """Say what is waited for while the block lasts."""
        wait = Wait(what, f"{self._prefix}{name}", self._nodes.get(name, ""), time.time())
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def start(self, *, tick: Tick) -> None:
        """Give every actor a place, begin them side by side, and wait until all are up.

        Raises `DoesNotFit` for one without a place after `wait_seconds`, `WorkerLost` for one that is not up
        `LOAD_SECONDS` later, and what a constructor raised.
        """
        from ...rollout.rewards.scorer import Scorer

        stage = self._stage
        self._begin("policy-0", PolicyActor, stage.policy, (self._spec,), tick)
        if stage.kl:
            self._begin("reference", ReferenceActor, stage.reference, (self._spec,), tick, **_STATELESS)
        for i in range(stage.scoring.workers):
            device = "cuda" if stage.scoring.resources.gpus else "cpu"
            given = (list(stage.rewards), Path("/"), stage.scoring.on_error, device)
            self._begin(f"reward-{i}", Scorer, stage.scoring.resources, given, tick, **_STATELESS)
            self._scorers.append(f"reward-{i}")
        for name, actor in self._actors.items():
            with self._waiting(name, "its start"):
                calls.get(actor.__ray_ready__.remote(), actor=name, what="its start", timeout=LOAD_SECONDS, tick=tick)

    def _begin(
        self, name: str, role: type, resources: Resources, given: tuple[Any, ...], tick: Tick, **options: int
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        def cancelled() -> bool:
            tick()  # what it raises gives the place back
            return False

        with self._waiting(name, f"a place with {amount(resources.cpus, resources.gpus)}"):
            placement = place(f"{self._prefix}{name}", resources, self._wait_seconds, cancelled=cancelled)
        self._placements.append(placement)
        self._nodes[name] = node_of(placement) or ""
        actor = ray.remote(role).options(
            name=f"{self._prefix}{name}",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
            **options,
        )
        self._actors[name] = actor.remote(*given)

    def score(self, groups: Sequence[Group], *, tick: Tick) -> Iterator[Group]:
        """Groups with rewards, in order; scorers work side by side."""
        names = [self._scorers[i % len(self._scorers)] for i in range(len(groups))]
        refs = [self._actors[name].score.remote(group) for name, group in zip(names, groups, strict=True)]
        for name, ref, group in zip(names, refs, groups, strict=True):
            what = f"step {group.step} group {group.index}"
            with self._waiting(name, f"the reward of {what}"):
                scored = calls.get(ref, actor=name, what=what, timeout=self._timeout, tick=tick)
            yield scored

    def scoring_troubles(self) -> dict[str, float]:
        """Errors, overruns and dropped groups of all scorers since the start; empty while there are none."""
        counts: Counter[str] = Counter()
        for name in self._scorers:
            ref = self._actors[name].counters.remote()
            counts.update(calls.get(ref, actor=name, what="its counters", timeout=self._timeout))
        return {f"scoring/{name}": value for name, value in counts.items() if name != "seconds"}

    def reference_logprobs(self, samples: Sequence[TrainSample], *, tick: Tick) -> list[np.ndarray]:
        """The reference's log-probs `[T]` of each sample; there is a reference only where KL is on."""
        with self._waiting("reference", "log-probs"):
            ref = self._actors["reference"].logprobs.remote(samples)
            return calls.get(ref, actor="reference", what="log-probs", timeout=self._timeout, tick=tick)

    def update(
        self, samples: Sequence[TrainSample], step: int, kl_coefficient: float, *, tick: Tick
    ) -> dict[str, float]:
        """One optimizer step; its metrics."""
        return self._ask_policy(f"the update of step {step}", tick, "update", samples, step, kl_coefficient)

    def publish(self, version: int, workers: tuple[str, ...], *, tick: Tick) -> WeightVersion:
        """The policy's weights, in the object store."""
        return self._ask_policy(f"publishing version {version}", tick, "publish", version, workers)

    def save(self, folder: Path, *, tick: Tick) -> None:
        """Have the policy write its state."""
        self._ask_policy("a checkpoint", tick, "save", folder)

    def load(self, folder: Path, *, tick: Tick) -> None:
        """Have the policy go on from a checkpoint."""
        self._ask_policy(f"loading {folder}", tick, "load", folder)

    def _ask_policy(self, what: str, tick: Tick, method: str, *given: Any) -> Any:
        with self._waiting("policy-0", what):
            ref = getattr(self._actors["policy-0"], method).remote(*given)
            return calls.get(ref, actor="policy-0", what=what, timeout=self._timeout, tick=tick)

    def write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's samples as parquet."""
        write_samples(self._samples, step, groups)

    def counts(self) -> dict[str, int]:
        """How many actors each role has."""
        return {"policy": 1, "reference": int("reference" in self._actors), "reward": len(self._scorers)}

    def close(self) -> None:
        """End every actor and give its place back."""
        calls.end(list(self._actors.values()))
        for placement in self._placements:
            release(placement)
        self._actors, self._placements, self._scorers, self._nodes = {}, [], [], {}
