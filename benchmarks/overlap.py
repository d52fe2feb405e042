"""What generating ahead is worth: seconds a step with `staleness` k against 0, roles that only take their time.

The loop, the pool, checkpoints and the run directory are those of a run, rollout workers and roles are real actors that
sleep; so two cores are enough to show what the machine's number of cores would hide. With g seconds of generation and
u of update, n steps take n (g + u) one after the other, and at best g + (n − 1) max(g, u) + u.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import Parcel, WeightVersion
from raylign.rollout.places import Places
from raylign.rollout.pool import RolloutPool
from raylign.trainers.online.actors import Actors, Tick
from raylign.trainers.online.ahead import Prompt
from raylign.trainers.online.loop import OnlineLoop
from raylign.trainers.online.policy import PolicySpec
from raylign.trainers.online.roles import Roles
from raylign.trainers.stages import OnlineStage

from .arena import Arena
from .measured import Case, Contest, Measured
from .null_pool import GROUP, local_ray, null_role, null_spec

_WORKERS = 2
_CAPACITY = 4
_GROUPS = 16
"""A step: two rounds of what all workers run at once."""
_STEPS = 10


def _roles() -> tuple[type, type]:
    """The actor classes of policy and reward; local, so that they travel by value."""

    class Policy:
        def __init__(self, seconds: float) -> None:
            self._seconds = seconds

        def update(self, samples: Any, step: int, kl_coefficient: float) -> dict[str, float]:
            import time

            time.sleep(self._seconds)
            return {"updated": 1.0}

        def publish(self, version: int, workers: Any) -> WeightVersion:
            return WeightVersion(version, f"digest of {version}", Parcel(()), {}, "base")

        def save(self, folder: Path) -> None:
            (folder / "policy.safetensors").touch()

        def keep(self, folder: Path, versions: Any) -> None:
            pass

    class Reward:
        def score(self, group: Any) -> Any:
            from dataclasses import replace

            return replace(group, samples=tuple(replace(s, reward=float(i)) for i, s in enumerate(group.samples)))

        def counters(self) -> dict[str, float]:
            return {}

    return Policy, Reward


class SleepingActors(Actors):
    """Actors that have no model; an update takes so many seconds."""

    def __init__(self, update: float, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._update = update

    def begin(self, name: str, *_: Any, **__: Any) -> bool:
        """Start a sleeper unless it is there."""
        import ray

        if name in self:
            return False
        policy, reward = _roles()
        role, given = (policy, (self._update,)) if name == "policy-0" else (reward, ())
        self._there[name] = ray.remote(role).options(num_cpus=0).remote(*given)
        return True


class SleepingRoles(Roles):
    """Roles whose actors have no model."""

    began = 0.0
    """When the first weights were there."""

    def __init__(self, update: float, *given: Any, **named: Any) -> None:
        self.crew = partial(SleepingActors, update)
        super().__init__(*given, **named)

    def publish(self, version: int, workers: tuple[str, ...], *, tick: Tick) -> WeightVersion:
        published = super().publish(version, workers, tick=tick)
        if version == 0:
            self.began = time.perf_counter()
        return published


class Runner:
    """Runs stages of some staleness on workers and roles that are there already."""

    def __init__(self, folder: Path, generation: float, update: float) -> None:
        self._folder, self._update, self._runs = folder, update, 0
        spec = null_spec(folder, workers=_WORKERS, capacity=_CAPACITY)
        seconds = generation * _WORKERS * _CAPACITY / _GROUPS
        self.pool = RolloutPool(
            prefix=f"overlap-{os.getpid()}-{generation:g}-{update:g}/",
            spec=spec,
            wait_seconds=300,
            note=lambda *_, **__: None,
            role=null_role(folder, seconds, steady=True),
        )
        stage = self._stage(0)
        spec = PolicySpec(base=folder, base_digest="base", adapter=None, stage=stage, seed=0, dtype="float32")
        self.roles = SleepingRoles(
            update,
            "overlap/",
            spec,
            stage,
            Places(),
            samples=folder / "samples",
            wait_seconds=60,
            inbox=self.pool.inbox,
            note=lambda *_, **__: None,
        )

    def _stage(self, staleness: int) -> OnlineStage:
        return OnlineStage.model_validate(
            {
                "data": {"path": "none"},
                "rewards": [{"type": "format", "pattern": "x"}],
                "steps": _STEPS,
                "batch_size": _GROUPS * GROUP,
                "checkpoint_every": _STEPS,
                "rollout": {"group_size": GROUP},
                "staleness": staleness,
            }
        )

    def run(self, staleness: int) -> Measured:
        """A whole run, with roles of its own; the seconds are those from its first weights on."""
        self._runs += 1
        run = RunDir(self._folder / f"run-{self._runs}")
        run.path.mkdir()
        prompts = [Prompt(ids=np.full(32, i, np.int32), row={"prompt": [{"content": str(i)}]}) for i in range(64)]
        loop = OnlineLoop(
            self._stage(staleness),
            "grpo",
            prompts=prompts,
            roles=self.roles,
            pool=self.pool,
            run=run,
            checkpoints=run / "checkpoints",
            seed=0,
            on_metrics=lambda *_: None,
        )
        loop.run()
        took = time.perf_counter() - self.roles.began
        self.roles.close()
        return Measured(amount=_STEPS, seconds=took, cpu_seconds=took)


@contextmanager
def runner(generation: float, update: float) -> Iterator[Runner]:
    """A runner on a Ray of its own."""
    with TemporaryDirectory(prefix="raylign-overlap-") as folder:
        made = Runner(Path(folder), generation, update)
        try:
            yield made
        finally:
            made.roles.close()
            made.pool.close()


def cases() -> list[Case]:
    """Named like `gen-0.5-update-0.5-k1-vs-k0`."""
    return [_case(g, u, k) for g, u in ((0.5, 0.5), (0.75, 0.25), (0.25, 0.75)) for k in (1, 2)]


def quick_cases() -> list[Case]:
    """A single one."""
    return [_case(0.2, 0.2, 1)]


def _case(generation: float, update: float, staleness: int) -> Case:
    return Case(
        name=f"gen-{generation:g}-update-{update:g}-k{staleness}-vs-k0",
        peer="staleness 0",
        unit="steps/s",
        group="overlap",
        make=partial(_contest, generation, update, staleness),
    )


def _contest(generation: float, update: float, staleness: int, arena: Arena) -> Contest:
    arena.entered(local_ray)
    here: Runner = arena.entered(runner, generation, update)
    steps, longer = _STEPS, max(generation, update)
    best = steps * (generation + update) / (generation + (steps - 1) * longer + update)
    return Contest(
        ours=lambda _: here.run(staleness),
        theirs=lambda _: here.run(0),
        warm_up=lambda: here.run(staleness),
        limit_ratio=best,
        settings={
            "workers": _WORKERS,
            "groups": _GROUPS,
            "steps": steps,
            "seconds": {"generation": generation, "update": update},
            "staleness": staleness,
        },
    )
