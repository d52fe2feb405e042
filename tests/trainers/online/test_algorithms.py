"""Every algorithm through the real loop on a tiny model; dynamic sampling the same for any workers and on resume.

Roles other than rollout work in this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.stages import ALGORITHMS

from .conftest import Train
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


FROM_ALL = ("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo", "spin")
"""Those that learn from groups without variance too: their KL varies, no mean of the group is taken off, or the loss
has an entropy bonus."""

OF_PAIRS = ("online_dpo", "spin")


@pytest.fixture
def train(train_here: Train) -> Train:
    """Trains an algorithm with what it has here besides its presets."""

    def run_it(name: str, algorithm: str, *given: Any, **fields: Any) -> RunDir:
        return train_here(name, algorithm, *given, **(EXTRAS.get(algorithm, {}) | fields))

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
        assert told["samples/trained"] == taught or (told["samples/trained"] == 32 and algorithm in FROM_ALL)
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


def test_what_nobody_foresaw_costs_no_checkpoint_that_is_being_written(train: Train, tmp_path: Path) -> None:
    def break_down(_: RunDir, done: int) -> None:
        if done == 2:
            raise ZeroDivisionError("by an owl")

    with pytest.raises(ZeroDivisionError, match="by an owl"):
        train("startled", "grpo", break_down, steps=4, checkpoint_every=1)
    assert [folder.name for folder in (tmp_path / "startled/checkpoints").iterdir()] == ["step-000001"]
