"""A small disk, and runs whose roles, other than rollout, work in this process: an actor takes seconds to start.

Loop, pool and rollout worker are those of a run; the pool is one for all runs of a file.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest
from raylign.rollout.places import Places
from raylign.rollout.pool import RolloutPool
from raylign.rollout.worker import WorkerSpec
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.data.template import stop_tokens
from raylign.trainers.online.actors import Actors
from raylign.trainers.online.held_out import HeldOut
from raylign.trainers.online.loop import OnlineLoop
from raylign.trainers.online.policy import PolicySpec
from raylign.trainers.online.roles import Roles
from raylign.trainers.online.stage import _prompts
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe


class InProcess:
    """An actor's class, called as an actor is, without a process of its own."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, method: str) -> Any:
        import ray

        if method == "__ray_ready__":
            return SimpleNamespace(remote=lambda: ray.put(True))

        def called(*given: Any) -> Any:
            held = [ray.get(x) if isinstance(x, ray.ObjectRef) else x for x in given]
            return ray.put(getattr(self._made, method)(*held))

        return SimpleNamespace(remote=called)


class ActorsHere(Actors):
    """Actors without processes."""

    def begin(self, name: str, role: type, resources: Any, given: tuple[Any, ...], *_: Any, **__: Any) -> bool:
        if name in self:
            return False
        self._there[name] = InProcess(role(*given))
        return True


class RolesHere(Roles):
    """Roles without processes."""

    crew = ActorsHere


@pytest.fixture(scope="module")
def pool(ray_session: str, tiny_model: Path) -> Iterator[Callable[[WorkerSpec], RolloutPool]]:
    """Gives the one pool, started for the spec of the first run; all runs' specs must be alike."""
    made: list[tuple[WorkerSpec, RolloutPool]] = []

    def give(spec: WorkerSpec) -> RolloutPool:
        if not made:
            made.append((spec, RolloutPool(prefix="here/", spec=spec, wait_seconds=60, note=lambda *_, **__: None)))
        assert spec == made[0][0]
        return made[0][1]

    yield give
    for _, started in made:
        started.close()


Train = Callable[..., RunDir]


@pytest.fixture
def train_here(tiny_grpo: Callable[..., Path], pool: Callable[[WorkerSpec], RolloutPool], tmp_path: Path) -> Train:
    """Trains an algorithm, as `run_online_stage` does; `act(run, done)` happens after each step."""

    def run_it(
        name: str,
        algorithm: str,
        act: Callable[[RunDir, int], None] = lambda *_: None,
        workers: int = 1,
        roles_here: type[RolesHere] = RolesHere,
        **fields: Any,
    ) -> RunDir:
        answers = [f'{{"prompt": "word {n}", "completion": "{n} eels"}}\n' for n in range(10)]
        (tmp_path / "answers.jsonl").write_text("".join(answers))
        (tmp_path / "held_out.jsonl").write_text("".join(f'{{"prompt": "other {n}"}}\n' for n in range(3)))
        fields = {"type": algorithm, "steps": 2, "kl": "null", **fields}
        config = load_recipe(tiny_grpo(name, **{f"stages__0__{key}": value for key, value in fields.items()}))
        run = open_run(config, tmp_path, named=True, resume=True)
        inputs, stage = read_inputs(config, run.path), config.stages[0]
        base, given = inputs.model, inputs.stages[0]
        spec = PolicySpec(
            base=base, base_digest=base_digest(base), adapter=None, stage=stage, seed=config.seed, dtype="float32"
        )
        worker = WorkerSpec(
            base=base,
            dtype="float32",
            config=stage.rollout,
            seed=config.seed,
            max_length=stage.rollout.max_prompt_tokens + stage.rollout.sampling.max_tokens,
            stop_token_ids=tuple(sorted(stop_tokens(inputs.tokenizer))),
        )
        shared = pool(worker)
        shared.scale(workers)
        folder = run / "samples" / algorithm
        roles = roles_here(
            "here/", spec, stage, Places(), samples=folder, wait_seconds=60, inbox=shared.inbox, note=run.event
        )
        loop = OnlineLoop(
            stage,
            algorithm,
            prompts=_prompts(given),
            roles=roles,
            pool=shared,
            run=run,
            checkpoints=run / "checkpoints",
            seed=config.seed,
            on_metrics=lambda step, told: act(run, step + 1) if "reward/mean" in told else None,
            held_out=HeldOut(stage, _prompts(given.held_out), shared, roles) if given.held_out else None,
        )
        loop.run()
        run.event("weights", version=loop.version, digest=loop.weights.digest)
        return run

    return run_it


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
