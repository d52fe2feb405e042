"""The actors of an online stage besides the rollout pool: policy, reference, critic and reward."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import Resources
from ...cluster.errors import WorkerFailed, WorkerLost
from ...cluster.placement import amount, node_of, place, release
from ...cluster.weights import WeightVersion
from ...rollout.inbox import Inbox
from ...rollout.records import Group
from ..stages import OnlineStage
from .batch import TrainSample
from .critic import CriticActor
from .policy import PolicyActor, PolicySpec, ReferenceActor
from .samples import write_samples
from .scoring import Scoring, Then

LOAD_SECONDS = 1800.0
"""How long an actor may take to load its model or its rewards once it has a place."""

END_SECONDS = 60.0
"""How long an actor that was ended may go on holding its name."""

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
        self, prefix: str, spec: PolicySpec, stage: OnlineStage, *, samples: Path, wait_seconds: float, inbox: Inbox
    ) -> None:
        self._prefix, self._spec, self._stage, self._samples = prefix, spec, stage, samples
        self._timeout, self._wait_seconds = stage.timeout_seconds, wait_seconds
        self._placements: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._inbox = inbox
        self._scoring = Scoring(inbox, self._timeout)
        self._scorers: list[str] = []
        self._nodes: dict[str, str] = {}
        self._waits: list[Wait] = []
        self._pulses: dict[str, Any] = {}
        """Open calls on those who learn, which end at once when their processes do."""
        self.lost: set[str] = set()
        """Who died, hung or failed; `start` begins them anew after `end`."""

    def waiting(self) -> list[Wait]:
        """What is waited for from an actor now."""
        return [*self._waits, *self._scoring.waiting(self._prefix)]

    @contextmanager
    def _waiting(self, name: str, what: str) -> Iterator[None]:
        """Say what is waited for while the block lasts, and note who is lost in it."""
        wait = Wait(what, f"{self._prefix}{name}", self._nodes.get(name, ""), time.time())
        self._waits.append(wait)
        try:
            yield
        except (WorkerLost, WorkerFailed):
            self.lost = self.lost or {name}  # the first: a wait may end because `tick` found another one dead
            raise
        finally:
            self._waits.remove(wait)

    def start(self, *, tick: Tick) -> bool:
        """Give every actor that is not there a place, begin them side by side, and wait until all are up.

        Returns whether those who learn are new, and have learned nothing yet. Raises `DoesNotFit` for one without a
        place after `wait_seconds`, `WorkerLost` for one that is not up `LOAD_SECONDS` later, and what a constructor
        raised.
        """
        from ...rollout.rewards.scorer import Scorer

        stage = self._stage
        new = self._begin("policy-0", PolicyActor, stage.policy, (self._spec,), tick)
        if stage.kl:
            self._begin("reference", ReferenceActor, stage.reference, (self._spec,), tick, **_STATELESS)
        if stage.critic:
            self._begin("critic", CriticActor, stage.critic.resources, (self._spec,), tick)
        for i in range(stage.scoring.workers):
            device = "cuda" if stage.scoring.resources.gpus else "cpu"
            given = (list(stage.rewards), Path("/"), stage.scoring.on_error, device)
            name = f"reward-{i}"
            if self._begin(name, Scorer, stage.scoring.resources, given, tick, **_STATELESS):
                self._scoring.join(name, self._actors[name], self._nodes.get(name, ""))
        self._scorers = [f"reward-{i}" for i in range(stage.scoring.workers)]
        for name, actor in self._actors.items():
            with self._waiting(name, "its start"):
                calls.get(actor.__ray_ready__.remote(), actor=name, what="its start", timeout=LOAD_SECONDS, tick=tick)
        return new

    def _begin(
        self, name: str, role: type, resources: Resources, given: tuple[Any, ...], tick: Tick, **options: int
    ) -> bool:
        """Start an actor unless it is there; whether it was not."""
        if name in self._actors:
            return False
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        def cancelled() -> bool:
            tick()  # what it raises gives the place back
            return False

        calls.wait_until_gone(f"{self._prefix}{name}", timeout=END_SECONDS, tick=tick)
        with self._waiting(name, f"a place with {amount(resources.cpus, resources.gpus)}"):
            placement = place(f"{self._prefix}{name}", resources, self._wait_seconds, cancelled=cancelled)
        self._placements[name] = placement
        self._nodes[name] = node_of(placement) or ""
        actor = ray.remote(role).options(
            name=f"{self._prefix}{name}",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
            **options,
        )
        self._actors[name] = actor.remote(*given)
        return True

    def look_after(self) -> None:
        """Notice the death of one who learns while nothing is asked of it. Raises `WorkerLost`."""
        import ray

        for name in self.learners():
            pulse = self._pulses.setdefault(name, self._actors[name].__ray_ready__.remote())
            if ray.wait([pulse], timeout=0)[0]:
                del self._pulses[name]
                with self._waiting(name, "a sign of life"):
                    calls.get(pulse, actor=name, what="its idle time", timeout=0)

    def score(self, group: Group, then: Then) -> None:
        """Have a group scored; `then` gets it with rewards. What goes wrong, `require_scores` raises."""
        self._scoring.score(group, then)

    def withdraw_scores(self) -> None:
        """Wait for no score that was asked for so far."""
        self._scoring.withdraw()

    def require_scores(self) -> None:
        """Raise what went wrong with the scoring of a group, if anything."""
        failed = self._scoring.failed()
        gone = {name for name, error in failed.items() if isinstance(error, (WorkerLost, WorkerFailed))}
        self.lost = self.lost or gone
        for error in failed.values():
            raise error

    def ask_scoring_troubles(self) -> dict[str, Any]:
        """Have the scorers count what went wrong in all they were given so far; for `scoring_troubles`."""
        return {name: self._actors[name].counters.remote() for name in self._scorers}

    def scoring_troubles(self, asked: dict[str, Any], *, tick: Tick) -> dict[str, float]:
        """Errors, overruns and dropped groups of all scorers since the start; empty while there are none."""
        counts: Counter[str] = Counter()
        for name, ref in asked.items():
            counts.update(self._answer(name, "its counters", tick, ref))
        return {f"scoring/{name}": value for name, value in counts.items() if name != "seconds"}

    def ask_reference(self, samples: Sequence[TrainSample]) -> Any:
        """Have the reference see samples; there is one only where KL is on. For `reference_logprobs`."""
        return self._actors["reference"].logprobs.remote(samples)

    def reference_logprobs(self, asked: Any, *, tick: Tick) -> list[np.ndarray]:
        """The reference's log-probs `[T]` of each sample it was asked for."""
        return self._answer("reference", "log-probs", tick, asked)

    def values(self, samples: Sequence[TrainSample], *, tick: Tick) -> list[np.ndarray]:
        """The critic's values `[T]` of each sample, where there is a critic."""
        return self._ask("critic", "values", tick, "values", samples)

    def update(
        self, samples: Sequence[TrainSample], step: int, kl_coefficient: float, *, tick: Tick
    ) -> dict[str, float]:
        """The updates of a step, of policy and critic side by side; their metrics."""
        what = f"the update of step {step}"
        critic = self._actors.get("critic")
        learning = critic.update.remote(samples, step) if critic else None
        told = self._ask("policy-0", what, tick, "update", samples, step, kl_coefficient)
        return told if learning is None else told | self._answer("critic", what, tick, learning)

    def publish(self, version: int, workers: tuple[str, ...], *, tick: Tick) -> WeightVersion:
        """The policy's weights, in the object store."""
        return self._ask("policy-0", f"publishing version {version}", tick, "publish", version, workers)

    def publish_kept(self, version: int, folder: Path, *, tick: Tick) -> WeightVersion:
        """An earlier version as a checkpoint has it, in the object store again."""
        return self._ask("policy-0", f"publishing version {version}", tick, "publish_kept", version, folder)

    def save(self, folder: Path, before: Sequence[WeightVersion], *, tick: Tick) -> None:
        """Have policy and critic write their state, and the versions before the policy's that steps still come from."""
        for name in self.learners():
            self._ask(name, "a checkpoint", tick, "save", folder)
        if before:
            self._ask("policy-0", "a checkpoint", tick, "keep", folder, before)

    def load(self, folder: Path, *, tick: Tick) -> None:
        """Have policy and critic go on from a checkpoint."""
        for name in self.learners():
            self._ask(name, f"loading {folder}", tick, "load", folder)

    def learners(self) -> list[str]:
        """Those whose state a checkpoint holds: policy and critic, as far as they are there."""
        return [name for name in ("policy-0", "critic") if name in self._actors]

    def _ask(self, name: str, what: str, tick: Tick, method: str, *given: Any) -> Any:
        return self._answer(name, what, tick, getattr(self._actors[name], method).remote(*given))

    def _answer(self, name: str, what: str, tick: Tick, ref: Any) -> Any:
        with self._waiting(name, what):
            return self._inbox.get(ref, actor=name, what=what, timeout=self._timeout, tick=tick)

    def write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's samples as parquet."""
        write_samples(self._samples, step, groups)

    def counts(self) -> dict[str, int]:
        """How many actors each role has."""
        there = {role: int(role in self._actors) for role in ("reference", "critic")}
        return {"policy": 1, **there, "reward": len(self._scorers)}

    def end(self, names: Iterable[str]) -> None:
        """End these actors, whatever they are at, and give their places back."""
        for name in names:
            calls.end([actor] if (actor := self._actors.pop(name, None)) else [])
            if placement := self._placements.pop(name, None):
                release(placement)
            self._nodes.pop(name, None)
            self._pulses.pop(name, None)
            self._scoring.leave(name)
        self.lost = set()

    def close(self) -> None:
        """End every actor."""
        self.end({*self._actors, *self._placements})
