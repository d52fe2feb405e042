"""Recipes with reward models: defaults, and what is refused before anything is read."""

import json
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import ModelReward
from raylign.trainers.config import RunConfig
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.pipeline import demands
from raylign.trainers.recipe import dump_recipe, load_recipe
from raylign.trainers.stages import OnlineStage, RewardModelStage

RECIPE = """\
name: rlhf
model: {path: ./model}
stages:
  - {type: sft, data: {path: turns.jsonl}}
  - {type: reward_model, data: {path: pairs.jsonl}, held_out: {path: held_out.jsonl}}
  - type: rloo
    data: {path: prompts.jsonl}
    rewards: [{type: model, stage: reward_model}]
  - {type: reward_model, name: late, data: {path: pairs.jsonl}}
"""


def load(folder: Path, *overrides: str, recipe: str = RECIPE) -> RunConfig:
    path = folder / "rlhf.yaml"
    path.write_text(recipe)
    return load_recipe(path, overrides)


def test_learning_rates_are_trls_and_may_be_set(tmp_path: Path) -> None:
    def rate(*overrides: str) -> float:
        return load(tmp_path, *overrides).stages[1].learning_rate

    assert rate() == 1e-5
    assert rate("stages.1.adapter={type: lora}") == 1e-4
    assert rate("stages.1.adapter={type: lora}", "stages.1.learning_rate=3e-4") == 3e-4


def test_paths_are_relative_to_the_recipe_and_stay_when_dumped(tmp_path: Path) -> None:
    config = load(tmp_path, "stages.2.rewards.0={type: model, path: ../scorer}")
    stage, online = config.stages[1:3]
    assert isinstance(stage, RewardModelStage)
    assert isinstance(online, OnlineStage)
    assert stage.held_out is not None
    assert stage.held_out.path == str(tmp_path / "held_out.jsonl")
    assert online.rewards == [ModelReward(path=str(tmp_path.parent / "scorer"))]
    (tmp_path / "again.yaml").write_text(dump_recipe(config))
    assert load_recipe(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{type: model}", "neither stage nor path: name the reward_model stage"),
        ("{type: model, stage: reward_model, path: x}", "both stage and path: name the reward_model stage"),
        ("{type: model, stage: reward_modl}", r"reward_modl': there is no such stage: did you mean 'reward_model'\?"),
        ("{type: model, stage: judge}", "stage 'judge': there is no such stage: there is reward_model"),
        ("{type: model, stage: late}", r"stage 'late': that stage comes after stages\.2: put it before"),
        ("{type: model, stage: sft}", "stage 'sft' is of type sft, which makes no reward model: there is reward_model"),
        ("{type: model, path: x, timeout_seconds: 3}", "timeout_seconds"),
    ],
)
def test_a_reward_that_names_no_earlier_reward_model_is_refused(tmp_path: Path, reward: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"rlhf\.yaml.*{message}"):
        load(tmp_path, f"stages.2.rewards=[{reward}]")


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        ("{stage: judge}", r"stages\.2\.critic\.stage 'judge': there is no such stage: there is reward_model"),
        ("{stage: late}", r"stages\.2\.critic\.stage 'late': that stage comes after stages\.2: put it before"),
        ("{stage: reward_model, path: x}", "stage 'reward_model' and path '.*x': a critic starts from one reward"),
    ],
)
def test_a_critic_starts_from_an_earlier_reward_model(tmp_path: Path, critic: str, message: str) -> None:
    ppo = "type: ppo, data: {path: prompts.jsonl}, rewards: [{type: model, stage: reward_model}]"
    with pytest.raises(InputError, match=rf"rlhf\.yaml.*{message}"):
        load(tmp_path, f"stages.2={{{ppo}, critic: {critic}}}")
    config = load(tmp_path, f"stages.2={{{ppo}, critic: {{path: scorer}}}}")
    assert config.stages[2].critic.path == str(tmp_path / "scorer")


def test_a_recipe_without_a_reward_model_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stages\.1\.rewards\.0\.stage 'judge': .* add a reward_model stage before"):
        load(
            tmp_path,
            "stages.1={type: grpo, data: {path: p}, rewards: [{type: model, stage: judge}]}",
            "stages.2={type: cpt, data: {path: p}}",
        )


def test_a_reward_models_adapter_is_new(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.path '.*': a reward model's adapter is new"):
        load(tmp_path, "stages.1.adapter={type: lora, path: x}")


def test_an_evaluation_asks_for_right_answers_which_a_reward_model_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown type 'model': one of function, format, math"):
        load(
            tmp_path,
            "serve={alias: x}",
            "evaluation={data: {path: p}, rewards: [{type: model, stage: reward_model}]}",
        )


def test_held_out_pairs_that_are_trained_on_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    def write(name: str, numbers: range) -> None:
        rows = [{"prompt": f"word {n}", "chosen": "yes", "rejected": "no"} for n in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("pairs.jsonl", range(10))
    write("held_out.jsonl", range(9, 15))
    alone = "stages=[{type: reward_model, data: {path: pairs.jsonl}, held_out: {path: held_out.jsonl}}]"
    config = load(tmp_path, f"model.path={tiny_model}", alone)
    with pytest.raises(InputError, match=r"stage reward_model trains on 1 of the evaluation's prompts.*'word 9'"):
        read_inputs(config, tmp_path)
    write("held_out.jsonl", range(10, 15))
    given = read_inputs(config, tmp_path).stages[0]
    assert (len(given.proof.require()), len(given.held_out.rows)) == (10, 5)


def test_a_policy_folder_as_reward_model_is_refused_with_its_key(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    rewards = f"[{{type: model, path: {tiny_model}}}]"
    grpo = f"stages=[{{type: grpo, data: {{path: prompts.jsonl}}, rewards: {rewards}}}]"
    with pytest.raises(InputError, match=r"^stages\.0\.rewards\.0\.path: .* is LlamaForCausalLM, not a model for"):
        read_inputs(load(tmp_path, f"model.path={tiny_model}", grpo), tmp_path)


def test_a_reward_model_stage_asks_for_training_workers(tmp_path: Path) -> None:
    config = load(tmp_path, "stages.1.workers=2")
    assert [(d.role, d.count) for d in demands(config.stages[1])] == [("train worker", 2)]
