"""What a sweep tries, and how much of it fits."""

from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import DoesNotFit, InputError
from raylign.cluster.planning import Offer
from raylign.trainers.config import RunConfig
from raylign.trainers.sweep.search import at_once, goal_of
from raylign.trainers.sweep.space import Param, override, parse, require_valid


def test_the_forms_of_a_param() -> None:
    assert parse(
        ["stages.0.learning_rate=loguniform(1e-5, 1e-3)", "seed=randint(1, 4)", "a.b = choice(x, 2, [p, q])"]
    ) == [
        Param("stages.0.learning_rate", "loguniform", (1e-5, 1e-3)),
        Param("seed", "randint", (1, 4)),
        Param("a.b", "choice", ("x", 2, ["p", "q"])),
    ]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nothing to try"),
        (["lr"], "needs the form"),
        (["lr=1e-5"], "needs the form"),
        (["lr=normal(0, 1)"], "uniform, loguniform, randint, choice, grid"),
        (["lr=uniform(1)"], "two numbers, the smaller one first"),
        (["lr=uniform(2, 1)"], "two numbers, the smaller one first"),
        (["lr=uniform(a, b)"], "two numbers"),
        (["lr=loguniform(0, 1)"], "bounds above 0"),
        (["n=randint(1.5, 4)"], "whole numbers"),
        (["n=choice()"], "no value to choose from"),
        (["n=choice([)"], "no list of values"),
        (["n=choice(1)", "n=choice(2)"], "n is given twice"),
    ],
)
def test_what_is_no_param_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(texts)


def test_values_that_the_recipe_would_refuse_are_refused_first() -> None:
    seen: list[list[str]] = []

    def load(overrides: list[str]) -> None:
        seen.append(overrides)

    require_valid(parse(["seed=randint(1, 4)", "model.dtype=choice(float32, half)"]), load)
    assert seen == [["seed=1"], ["seed=3"], ["model.dtype=float32"], ["model.dtype=half"]]
    assert override("stages.0.targets", ["q_proj", "v_proj"]) == "stages.0.targets=[q_proj, v_proj]"


def _config(**stage: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "s", "model": {"path": str(Path("/m"))}, "stages": [{"data": {"path": "d.jsonl"}, "steps": 9} | stage]}
    )


def test_what_is_compared() -> None:
    sft = goal_of(_config(type="sft"), None, None, None)
    assert (sft.stage, sft.metric, sft.mode, sft.steps) == ("sft", "loss", "min", 9)
    assert goal_of(_config(type="sft"), None, "rewards/accuracies", None).mode == "max"
    assert goal_of(_config(type="sft"), None, "grad_norm", "max").mode == "max"
    with pytest.raises(InputError, match="'dpo' is none of the recipe's: sft"):
        goal_of(_config(type="sft"), "dpo", None, None)


def test_as_many_at_once_as_fit() -> None:
    two = _config(type="sft", workers=2, batch_size=8)
    assert at_once(two, [Offer("a", 4), Offer("b", 3)], 8) == 3
    assert at_once(two, [Offer("a", 4), Offer("b", 3)], 2) == 2
    with pytest.raises(DoesNotFit):
        at_once(two, [Offer("a", 1)], 8)
