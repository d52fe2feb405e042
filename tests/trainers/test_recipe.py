"""Recipes: what is wrong is answered with file, line, nearest name and the mend."""

import re
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.recipe import dump_recipe, load_recipe, resolve_prepared

RECIPE = """\
name: small
seed: 3
model: {path: ./model}
stages:
  - type: sft
    data: {path: data/train.jsonl}
    learning_rate: 1e-4
  - type: grpo
    data: {path: prompts.jsonl}
    batch_size: 32
    rewards:
      - {type: function, path: "rewards.py:exact"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_paths_are_relative_to_the_recipe(recipe: Path) -> None:
    config = load_recipe(recipe)
    assert config.model.path == str(recipe.parent / "model")
    assert config.stages[0].data.path == str(recipe.parent / "data/train.jsonl")
    assert config.stages[1].rewards[0].path == f"{recipe.parent}/rewards.py:exact"
    assert config.stages[0].learning_rate == 1e-4


def test_hub_ids_and_modules_and_prepared_paths_stay(recipe: Path) -> None:
    overrides = ["model.path=org/name", "stages.1.rewards.0.path=package.rewards:exact", "prepare.path=p.py:f"]
    config = load_recipe(recipe, [*overrides, "stages.0.data.path=prepared://x.jsonl"])
    assert config.model.path == "org/name"
    assert config.stages[1].rewards[0].path == "package.rewards:exact"
    assert config.stages[0].data.path == "prepared://x.jsonl"
    assert resolve_prepared(config.stages[0].data.path, Path("/run")) == Path("/run/prepared/x.jsonl")


def test_a_dumped_recipe_loads_to_the_same(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe, ["seed=9"])
    again = tmp_path / "elsewhere" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(dump_recipe(config))
    assert load_recipe(again) == config


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("learning_rate: 1e-4", "lerning_rate: 1e-4", 7, "did you mean 'learning_rate'?"),
        ("type: grpo", "type: gropo", 8, "did you mean 'grpo'?"),
        ("learning_rate: 1e-4", "learning_rate: fast", 7, "not 'fast'"),
        ("seed: 3", "seed: 3\nseed: 4", 3, "stands twice"),
        ("name: small", "name: ../small", 1, "String should match pattern"),
        ("batch_size: 32", "batch_size: 30", 8, "not a multiple of rollout.group_size 8: take 24"),
        ("model: {path: ./model}", "model: {}", 3, "'path' is missing"),
        ("model: {path: ./model}", "model: {path: [}", 3, "not valid YAML"),
        ("{path: ./model}", "!!python/object/apply:os.system [ls]", 3, "not valid YAML"),
        ("learning_rate: 1e-4", "workers: 3", 5, "batch_size 32 does not divide over 3 workers"),
        ("path: data/train.jsonl", "path: prepared://x", 1, "no prepare section"),
    ],
)
def test_mistakes_name_their_place_and_mend(recipe: Path, old: str, new: str, line: int, message: str) -> None:
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_recipe(recipe)
    assert message in str(error.value)
    assert str(recipe) in str(error.value)
    if "YAML" not in message:
        assert f"{recipe}:{line}:" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.1.rollout.sampling.top_p=0.9",
            "top_p 0.9: the trainer's log-probs are those of the temperature alone",
        ),
        ("stages.1.rollout.sampling.top_k=5", "top_k 5: the trainer's log-probs are those of the temperature alone"),
        (
            "stages.1.rollout.sampling.min_p=0.1",
            "min_p 0.1: the trainer's log-probs are those of the temperature alone",
        ),
        ("stages.1.rollout.sampling.temperature=0", "there is nothing to learn from; take 1.0"),
        ("stages.1.adapter={dropout: 0.1}", "adapter.dropout 0.1: the engine samples without dropout"),
    ],
)
def test_grpo_refuses_what_makes_trainer_and_engine_differ(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(recipe, [override])


EVALUATION = "evaluation={data: {path: %s}, rewards: [{type: format, pattern: x}], temperatures: [%s]}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["serve.alias=small-base"], "serve.alias 'small-base' is the name that the run serves its base model under"),
        (["serve.alias=small-sft"], "serve.alias 'small-sft' is the name that the run serves its sft model under"),
        (["storage=s3://bucket/runs"], "'s3://bucket/runs' is a URL: storage is a folder"),
        (["serve.alias=a", EVALUATION % ("prepared://x.jsonl", "0")], "there is no prepare section to write it"),
        (["serve.alias=a", EVALUATION % ("x.jsonl", "0, 2.5")], "less than or equal to 2"),
        (["serve.alias=a", EVALUATION % ("x.jsonl", "-1")], "greater than or equal to 0"),
        (["model.dtype=bfloat16"], "stages.0 (sft) runs on Ray Train, where weights are float32"),
    ],
)
def test_sections_that_disagree(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(recipe, overrides)


def test_bfloat16_is_for_the_base_under_a_grpo_adapter(recipe: Path) -> None:
    recipe.write_text(re.sub(r"  - type: sft\n.*\n.*\n", "", RECIPE))
    assert load_recipe(recipe, ["model.dtype=bfloat16", "stages.0.adapter={r: 4}"]).model.dtype == "bfloat16"
    with pytest.raises(InputError, match=r"stages\.0 \(grpo\) trains all weights"):
        load_recipe(recipe, ["model.dtype=bfloat16"])


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed", "key.path=value"), ("stages.9.x=1", "nothing at stages.9.x"), ("stages.0.lr=1", "did you mean")],
)
def test_overrides_that_miss(recipe: Path, override: str, message: str) -> None:
    if override.endswith("lr=1"):
        override, message = "stages.0.learning_rat=1", "did you mean 'learning_rate'?"
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        load_recipe(recipe, [override])


def test_a_missing_recipe_names_the_nearest(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean small\.yaml\?"):
        load_recipe(recipe.parent / "smal.yaml")
