"""The actors of an online stage besides the rollout pool: policy, reference and reward."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster import calls
from ..cluster.weights import WeightVersion
from ..rollout.records import Group
from .batch import TrainSample
from .policy import PolicyActor, PolicySpec, ReferenceActor
from .samples import write_samples
from .stages import GrpoStage

_STATELESS = {"max_restarts": 3, "max_task_retries": 3}
"""Ray starts these again elsewhere and repeats the call: what they answer depends on what they are asked alone."""


class Roles:
    """Starts the actors of a stage under names that `ray list actors` shows, and waits for what they do.

    Waiting raises `WorkerLost`, which names the actor and what it was doing.
    """

    def __init__(self, prefix: str, spec: PolicySpec, stage: GrpoStage, *, samples: Path, wait_seconds: float) -> None:
        import ray

        from ..rollout.scorer import Scorer

        self._prefix, self._stage, self._samples = prefix, stage, samples
        self._timeout = stage.rollout.timeout_seconds
        self._policy = self._start(ray.remote(PolicyActor), "policy-0", stage.policy).remote(spec)
        self.reference = None
        if stage.kl:
            reference = self._start(ray.remote(ReferenceActor), "reference", stage.reference, **_STATELESS)
            self.reference = reference.remote(spec)
        self._scorers = [
            self._start(ray.remote(Scorer), f"reward-{i}", stage.scoring.resources, **_STATELESS).remote(
                list(stage.rewards), Path("/"), stage.scoring.on_error
            )
            for i in range(stage.scoring.workers)
        ]
        self._wait_seconds = wait_seconds

    def _start(self, role: Any, name: str, resources: Any, **options: int) -> Any:
        return role.options(name=f"{self._prefix}{name}", num_cpus=resources.cpus, num_gpus=resources.gpus, **options)

    def wait_ready(self) -> None:
        """Block until every actor is up. Raises what its constructor raised."""
        actors = {"policy-0": self._policy, **{f"reward-{i}": s for i, s in enumerate(self._scorers)}}
        if self.reference:
            actors["reference"] = self.reference
        for name, actor in actors.items():
            calls.get(actor.__ray_ready__.remote(), actor=name, what="its start", timeout=self._wait_seconds)

    def score(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Groups with rewards, in order; scorers work side by side."""
        refs = [self._scorers[i % len(self._scorers)].score.remote(g) for i, g in enumerate(groups)]
        for i, ref in enumerate(refs):
            what = f"step {groups[i].step} group {groups[i].index}"
            yield calls.get(ref, actor=f"reward-{i % len(self._scorers)}", what=what, timeout=self._timeout)

    def scoring_troubles(self) -> dict[str, float]:
        """Errors, overruns and dropped groups of all scorers since the start; empty while there are none."""
        counts: Counter[str] = Counter()
        for i, scorer in enumerate(self._scorers):
            name = f"reward-{i}"
            counts.update(calls.get(scorer.counters.remote(), actor=name, what="its counters", timeout=self._timeout))
        return {f"scoring/{name}": value for name, value in counts.items() if name != "seconds"}

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """The reference's log-probs `[T]` of each sample."""
        assert self.reference is not None, "asked for only when KL is on"
        ref = self.reference.logprobs.remote(samples)
        return calls.get(ref, actor="reference", what="log-probs", timeout=self._timeout)

    def update(self, samples: Sequence[TrainSample], step: int) -> dict[str, float]:
        """One optimizer step; its metrics."""
        ref = self._policy.update.remote(samples, step)
        return calls.get(ref, actor="policy-0", what=f"the update of step {step}", timeout=self._timeout)

    def publish(self, version: int) -> WeightVersion:
        """The policy's weights, in the object store."""
        ref = self._policy.publish.remote(version)
        return calls.get(ref, actor="policy-0", what=f"publishing version {version}", timeout=self._timeout)

    def save(self, folder: Path) -> None:
        """Have the policy write its state."""
        calls.get(self._policy.save.remote(folder), actor="policy-0", what="a checkpoint", timeout=self._timeout)

    def load(self, folder: Path) -> None:
        """Have the policy go on from a checkpoint."""
        calls.get(self._policy.load.remote(folder), actor="policy-0", what=f"loading {folder}", timeout=self._timeout)

    def write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's samples as parquet."""
        write_samples(self._samples, step, groups)

    def counts(self) -> dict[str, int]:
        """How many actors each role has."""
        return {"policy": 1, "reference": int(self.reference is not None), "reward": len(self._scorers)}

    def close(self) -> None:
        """End every actor."""
        calls.end([a for a in (self._policy, self.reference, *self._scorers) if a is not None])
