"""Every algorithm through the real loop on a tiny model; dynamic sampling the same for any workers and on resume.

Loop, pool and rollout worker are those of a run. What the other roles do runs in this process, since an actor takes
seconds to start; the pool is one for all runs.
"""

import json
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
from raylign.trainers.online.loop import OnlineLoop
from raylign.trainers.online.policy import PolicySpec
from raylign.trainers.online.roles import Roles
from raylign.trainers.online.stage import _prompts
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe
from raylign.trainers.stages import ALGORITHMS

from .runs import samples

REWARD_KL = "{coefficient: 0.05, adaptive: {target: 0.001, horizon: 100}}"
EXTRAS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"entropy_bonus": "0.01"},
    "gspo": {"mismatch": "{level: sequence, action: mask, low: 0.5, high: 2}"},
    "cispo": {"mismatch": "null"},
    "rloo": {"kl": REWARD_KL},
    "reinforce_pp": {"kl": REWARD_KL},
    "reinforce_pp_baseline": {"kl": "{coefficient: 0.05}"},
    "ppo": {"kl": REWARD_KL, "epochs": 2, "minibatches": 2, "critic": "{learning_rate: 1e-2}"},
    "online_dpo": {"epochs": 2, "minibatches": 2},
    "spin": {"data": "{path: answers.jsonl}"},
}
"""What an algorithm runs with here besides its presets, so that every option is in one of the runs."""


NO_BASELINE = ("rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo", "spin")
"""Those that learn from groups without variance too: their KL varies, or no mean of the group is taken off."""

OF_PAIRS = ("online_dpo", "spin")


class InProcess:
    """An actor's class, called as an actor is, without a process of its own."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, method: str) -> Any:
        import ray

        if method == "__ray_ready__":
            return SimpleNamespace(remote=lambda: ray.put(True))

        def called(*given: Any) -> Any:
            return ray.put(
                getattr(self._made, method)(*(ray.get(x) if isinstance(x, ray.ObjectRef) else x for x in given))
            )

        return SimpleNamespace(remote=called)


class RolesHere(Roles):
    """Roles without processes."""

    def _begin(self, name: str, role: type, resources: Any, given: tuple[Any, ...], *_: Any, **__: Any) -> bool:
        self._actors[name] = InProcess(role(*given))
        return True


@pytest.fixture(scope="module")
def pool(ray_session: str, tiny_model: Path) -> Iterator[Callable[[WorkerSpec], RolloutPool]]:
    """Gives the one pool, started for the spec of the first run; all runs' specs must be alike."""
    made: list[tuple[WorkerSpec, RolloutPool]] = []

    def give(spec: WorkerSpec) -> RolloutPool:
        if not made:
            made.append(
                (spec, RolloutPool(prefix="algorithms/", spec=spec, wait_seconds=60, note=lambda *_, **__: None))
            )
        assert spec == made[0][0]
        return made[0][1]

    yield give
    for _, started in made:
        started.close()


Train = Callable[..., RunDir]


@pytest.fixture
def train(tiny_grpo: Callable[..., Path], pool: Callable[[WorkerSpec], RolloutPool], tmp_path: Path) -> Train:
    """Trains an algorithm, as `run_online_stage` does; `act(run, done)` happens after each step."""

    (tmp_path / "answers.jsonl").write_text(
        "".join(f'{{"prompt": "word {n}", "completion": "{n} eels"}}\n' for n in range(10))
    )

    def run_it(
        name: str, algorithm: str, act: Callable[[RunDir, int], None] = lambda *_: None, workers: int = 1, **fields: Any
    ) -> RunDir:
        fields = {"type": algorithm, "steps": 2, "kl": "null", **EXTRAS.get(algorithm, {}), **fields}
        config = load_recipe(tiny_grpo(name, **{f"stages__0__{key}": value for key, value in fields.items()}))
        run = open_run(config, tmp_path, named=True, resume=True)
        inputs, stage = read_inputs(config, run.path), config.stages[0]
        base = inputs.model
        spec = PolicySpec(
            base=base, base_digest=base_digest(base), adapter=None, stage=stage, seed=config.seed, dtype="float32"
        )
        worker = WorkerSpec(
            base=base,
            dtype="float32",
            config=stage.rollout,
            seed=config.seed,
            max_length=52,
            stop_token_ids=(2,),
        )
        roles = RolesHere("algorithms/", spec, stage, Places(), samples=run / "samples" / algorithm, wait_seconds=60)
        shared = pool(worker)
        shared.scale(workers)
        loop = OnlineLoop(
            stage,
            algorithm,
            prompts=_prompts(inputs.stages[0]),
            roles=roles,
            pool=shared,
            run=run,
            checkpoints=run / "checkpoints",
            seed=config.seed,
            on_metrics=lambda step, _: act(run, step + 1),
        )
        loop.run()
        run.event("weights", version=loop.version, digest=loop.weights.digest)
        return run

    return run_it


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "dapo"])
def test_it_trains(algorithm: str, train: Train) -> None:
    run = train("one", algorithm)
    first, second = run.all_metrics()
    assert second["version"] == 2
    for told in (first, second):
        assert told["grad_norm"] > 0
        assert told["entropy"] > 0
        taught = (4 - told["groups/no_variance"]) * (1 if algorithm == "online_dpo" else 8)
        assert told["samples/trained"] == taught or (told["samples/trained"] == 32 and algorithm in NO_BASELINE)
        assert ("preference/accuracy" in told) == (algorithm in OF_PAIRS)
        assert told["mismatch/max"] < 1e-3
        assert 0 <= told["mismatch/kl"] < 1e-6
        assert told["mismatch/masked"] == 0
    assert first["reward/mean"] != second["reward/mean"]
    if "kl" in EXTRAS.get(algorithm, {}):
        assert abs(first["kl/completion"]) < 1e-3  # the policy is its reference still
        assert second["kl/completion"] > 1e-3
        moved = second["kl/coefficient"] != first["kl/coefficient"] == 0.05
        assert moved == ("adaptive" in EXTRAS[algorithm]["kl"])


def test_a_reference_with_the_adapter_off_is_the_actor_of_its_own_bit_for_bit(train: Train) -> None:
    left = []
    for name, reference in (("own", "{cpus: 0.5}"), ("within", "adapter_off")):
        run = train(name, "rloo", reference=reference)
        assert run.status()["workers"]["reference"] == (name == "own")
        assert run.all_metrics()[1]["kl/completion"] > 1e-3
        left.append(run.events("weights")[-1]["digest"])
    assert left[0] == left[1]


def test_dynamic_sampling_fills_the_batch_the_same_for_any_workers_and_on_resume(train: Train) -> None:
    rare = {
        "steps": 3,
        "rewards": '[{type: function, path: "rewards.py:rare"}]',
        "kl": REWARD_KL,
        "checkpoint_every": 3,
    }
    alone = train("alone", "dapo", **rare)
    told = alone.all_metrics()
    for step in told:
        assert step["groups/drawn"] - step["groups/no_variance"] >= 4
        assert step["samples/trained"] == 32
        assert step["reward/overlong"] < 0
    drawn = [int(step["groups/drawn"]) for step in told]
    assert max(drawn) > 4  # some of the first four of a step had no variance
    assert len({told[i]["kl/coefficient"] for i in range(3)}) == 3

    run = train("stopped", "dapo", lambda run, done: run.desire(stop=done == 2), **rare)
    assert len(run.all_metrics()) == 2
    state = json.loads((run / "checkpoints/step-000002/state.json").read_text())
    assert state["progress"] == {"drawn": sum(drawn[:2]), "kl_coefficient": told[2]["kl/coefficient"]}
    run.desire(stop=False)
    run = train("stopped", "dapo", workers=2, **rare)
    assert run.events("resumed")
    assert samples(run) == samples(alone)
    assert len({(s[0], s[1]) for s in samples(alone)}) == sum(drawn)
    assert run.events("weights")[-1]["digest"] == alone.events("weights")[-1]["digest"]


def test_policy_and_critic_of_ppo_are_the_same_bits_undisturbed_and_resumed(train: Train) -> None:
    def left(run: RunDir) -> dict[str, str]:
        return json.loads((run / "checkpoints/step-000003/manifest.json").read_text())

    fields = {"steps": 3, "checkpoint_every": 3}
    alone = train("alone", "ppo", **fields)
    learned = {f"{name}/shard-00000.safetensors" for name in ("policy", "critic")}
    assert set(left(alone)) == {*learned, "state.json"}
    first, second, _ = alone.all_metrics()
    assert first["updates"] == 4
    assert first["clip_fraction"] > 0
    assert first["value/mean"] == 0 < second["value/mean"]
    assert first["seconds/values"] > 0

    run = train("stopped", "ppo", lambda run, done: run.desire(stop=done == 2), **fields)
    assert len(run.all_metrics()) == 2
    run.desire(stop=False)
    run = train("stopped", "ppo", workers=2, **fields)
    assert run.events("resumed")
    assert samples(run) == samples(alone)
    assert {k: v for k, v in left(run).items() if k in learned} == {k: left(alone)[k] for k in learned}
