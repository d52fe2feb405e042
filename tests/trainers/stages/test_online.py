"""What a stage type presets, what a recipe may override, and what is refused."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from raylign.trainers.online import advantages, objectives
from raylign.trainers.stages import ALGORITHMS, OnlineStage


def stage(**fields: Any) -> OnlineStage:
    return OnlineStage.model_validate(
        {"data": {"path": "x"}, "rewards": [{"type": "format", "pattern": "x"}], **fields}
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_names_functions_that_exist(name: str) -> None:
    made = stage(type=name)
    if made.loss == "preference":  # of pairs, without an advantage
        return
    assert list(inspect.signature(getattr(advantages, made.advantage)).parameters) == ["rewards"]
    assert len(inspect.signature(getattr(objectives, made.loss)).parameters) == 4


@pytest.mark.parametrize(
    ("name", "advantage", "scale", "ratio", "aggregation", "clip"),
    [
        ("grpo", "group_mean", "batch", "token", "token", (0.2, 0.28, 3.0)),
        ("dr_grpo", "group_mean", "none", "token", "constant", (0.2, 0.2, None)),
        ("dapo", "group_mean", "group", "token", "token", (0.2, 0.28, None)),
        ("gspo", "group_mean", "group", "sequence", "sequence", (3e-4, 4e-4, None)),
        ("cispo", "group_mean", "batch", "token", "token", (0.2, 4.0, 3.0)),
        ("rloo", "leave_one_out", "none", "product", "sequence", (0.2, 0.2, None)),
        ("reinforce_pp", "returns", "tokens", "token", "token", (0.2, 0.2, None)),
        ("reinforce_pp_baseline", "group_mean", "tokens", "token", "token", (0.2, 0.2, None)),
        ("ppo", "gae", "tokens", "token", "token", (0.2, 0.2, None)),
        ("online_dpo", "none", "none", "token", "sequence", (0.2, 0.28, 3.0)),
        ("spin", "none", "none", "token", "sequence", (0.2, 0.28, 3.0)),
    ],
)
def test_presets(
    name: str, advantage: str, scale: str, ratio: str, aggregation: str, clip: tuple[float, float, float | None]
) -> None:
    made = stage(type=name)
    assert (made.advantage, made.advantage_scale, made.ratio, made.aggregation) == (
        advantage,
        scale,
        ratio,
        aggregation,
    )
    assert (made.clip.low, made.clip.high, made.clip.dual) == clip
    assert made.loss == {"cispo": "cispo", "online_dpo": "preference", "spin": "preference"}.get(name, "clipped")
    assert made.kl is None  # off unless the recipe has it
    assert made.has_reference == (name == "online_dpo")
    assert (made.demonstrations, made.keeps_old) == (name == "spin", name == "spin")
    assert bool(made.critic) == (name == "ppo")
    assert bool(made.dynamic_sampling) == bool(made.overlong) == (name == "dapo")


def test_a_preset_reaches_into_a_block_that_the_recipe_opens() -> None:
    assert (stage(type="rloo", kl={}).kl.place, stage(type="rloo", kl={}).kl.estimator) == ("reward", "k1")
    assert stage(type="rloo", kl={"place": "loss", "estimator": "k3"}).kl.place == "loss"
    assert stage(type="grpo", kl={}).kl.place == "loss"
    assert (stage(type="ppo", kl={}).kl.place, stage(type="ppo", kl={}).kl.estimator) == ("reward", "k1")
    assert stage(type="ppo", critic={"lam": 1.0}).critic.lam == 1.0
    assert stage(type="reinforce_pp_baseline", kl={"coefficient": 0.1}).kl.estimator == "k2"


def test_a_recipe_overrides_single_fields() -> None:
    made = stage(type="gspo", clip={"high": 0.1}, aggregation="token", loss="cispo")
    assert (made.clip.low, made.clip.high, made.aggregation, made.loss) == (3e-4, 0.1, "token", "cispo")
    assert stage(type="dapo", dynamic_sampling=None).dynamic_sampling is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl": {"estimator": "k1"}}, "k1 in the loss holds nothing back: on samples of the policy its gradient is 0"),
        (
            {"type": "reinforce_pp", "advantage_scale": "group"},
            "advantage_scale group is the spread about groups' means, and advantage returns takes none off: take",
        ),
        (
            {"overlong": {"buffer": 256}},
            "overlong.buffer 256 leaves no length unpunished: rollout.sampling.max_tokens is 256; take less",
        ),
        ({"mismatch": {"high": 0.5}}, "bounds None to 0.5 leave out the ratio 1"),
        ({"mismatch": {"low": 1.5, "high": 3}}, "bounds 1.5 to 3 leave out the ratio 1"),
        ({"dynamic_sampling": {"limit": 1}}, "greater than or equal to 2"),
        ({"type": "online_dpo", "kl": {}}, "kl a block: the loss of pairs has no such term; leave it out"),
        ({"type": "spin", "entropy_bonus": 0.1}, "entropy_bonus 0.1: the loss of pairs has no such term"),
        ({"loss": "preference"}, "loss preference with advantage group_mean: the loss of pairs takes none"),
        ({"type": "spin", "loss": "clipped"}, "loss clipped with advantage none: the loss of pairs takes none"),
        ({"demonstrations": True}, "demonstrations: loss clipped does not compare with answers of the data"),
        ({"type": "spin", "dynamic_sampling": {}}, "dynamic_sampling: pairs with demonstrations need no spread of"),
        ({"type": "ppo", "advantage_scale": "batch"}, "advantage gae takes none off: take tokens or none"),
        ({"type": "ppo", "critic": None}, "critic null: advantage gae is made of a critic's values; give critic: {}"),
        ({"critic": {}}, "critic: advantage group_mean asks no values, so a critic would learn for nothing; leave it"),
        ({"type": "ppo", "advantage": "returns"}, "critic: advantage returns asks no values"),
        ({"minibatches": 3}, "batch_size 128 does not divide into minibatches of equal size: minibatches is 3; take"),
        ({"loss": "ppo"}, "'clipped', 'cispo' or 'preference'"),
        ({"reference": "adapter_off"}, "reference adapter_off: the stage begins with no adapter block, so the policy"),
        ({"reference": "adapter_off", "adapter": {"path": "a"}}, "the stage begins with the adapter a, so the policy"),
        ({"policy": {"ranks": 0}}, "greater than or equal to 1"),
        ({"policy": {"gpus": 2}}, "gpus 2: a rank computes on one GPU; take gpus: 1 and more ranks"),
        ({"policy": {"ranks": 2, "gpus": 0.5}}, "gpus 0.5 with ranks 2: nccl takes no two ranks on one GPU; take gpus"),
        (
            {"policy": {"ranks": 65}, "minibatches": 2},
            "policy.ranks 65: an update has 64 completions (batch_size 128 over minibatches 2), so some ranks would",
        ),
        ({"type": "ppo", "critic": {"resources": {"ranks": 129}}}, "critic.resources.ranks 129: an update has 128"),
        ({"staleness": 5, "mismatch": None}, "staleness 5 with mismatch null: completions of weights so old mislead"),
        (
            {"staleness": 2, "partial_tokens": 70, "mismatch": None},
            "staleness 2 and partial_tokens 70 of rollout.sampling.max_tokens, 5 in all, with mismatch null: ",
        ),
        (
            {"partial_tokens": 256},
            "partial_tokens 256: rollout.sampling.max_tokens is 256, so no completion would be carried; take less, "
            "such as 128, or leave it out",
        ),
        (
            {
                "staleness": 1,
                "policy": {"gpus": 1},
                "rollout": {
                    "weights": {"transport": "nccl"},
                    "resources": {"gpus": 1},
                    "workers": {"min": 2, "max": 2, "start": 2},
                },
            },
            "staleness 1 with rollout.weights.transport nccl: a broadcast reaches all workers at once",
        ),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        stage(**fields)


def test_older_weights_are_taken_with_the_correction_and_a_few_without() -> None:
    assert stage(staleness=8).staleness == 8
    assert stage(staleness=4, mismatch=None).staleness == 4
    assert [stage(partial_tokens=n).oldest for n in (255, 128, 127, 64)] == [1, 1, 2, 3]
    assert stage(staleness=1, partial_tokens=64, mismatch=None).oldest == 4
    assert stage().staleness == 0


def test_the_stage_and_the_algorithms_of_the_readme_are_these() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (shown,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    assert OnlineStage.model_validate(shown).dynamic_sampling.limit == 5
    table = text.partition("| type | advantage | loss |")[2].partition("```")[0]
    assert set(re.findall(r"`(\w+)`", re.sub(r"as `grpo`", "", table))) == set(ALGORITHMS)
