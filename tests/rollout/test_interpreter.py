"""The Python of rollout actors, checked before anything starts: with real interpreters."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import RolloutConfig, SamplingConfig
from raylign.rollout.interpreter import check_interpreter
from raylign.trainers.recipe import load_recipe

WHERE = "stages.0.rollout"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_our_own_python_will_do() -> None:
    check_interpreter(RolloutConfig(), WHERE)
    check_interpreter(RolloutConfig(python=sys.executable), WHERE)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_vllm_engine_needs_an_environment_that_has_it() -> None:
    for rollout in (RolloutConfig(engine="vllm"), RolloutConfig(engine="vllm", python=sys.executable)):
        with pytest.raises(InputError, match=r"stages\.0\.rollout\.engine is vllm, which .* does not have: give"):
            check_interpreter(rollout, WHERE)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("exit 3", "does not run as a Python: exit code 3"),
        ("echo 'no module named site' >&2; exit 1", "does not run as a Python: no module named site"),
        ("echo hello", "does not run as a Python"),
        (
            'echo \'{"python": "3.9", "ray": "2.60.0", "raylign": "0.1.0", "vllm": null}\'',
            r"has python 3\.9, here it is 3\.\d+; actors of one cluster need the same",
        ),
        ('%(ours)s | sed \'s/"ray": "[0-9.]*"/"ray": null/\'', r"has ray not at all, here it is 2\."),
        ('%(ours)s | sed \'s/"raylign": "[0-9.]*"/"raylign": null/\'', "does not have raylign: install it there"),
    ],
)
def test_a_python_that_will_not_do_is_named(tmp_path: Path, answer: str, message: str) -> None:
    python = script(tmp_path / "python", answer % {"ours": f'{sys.executable} "$@"'} if "%" in answer else answer)
    with pytest.raises(InputError, match=rf"stages\.0\.rollout.*{message}"):
        check_interpreter(RolloutConfig(python=python), WHERE)


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"stages\.0\.rollout\.python: no Python at /none/such"):
        check_interpreter(RolloutConfig(python="/none/such"), WHERE)


def test_the_path_is_relative_to_the_recipe_and_its_link_is_not_followed(
    tmp_path: Path, tiny_grpo: Callable[..., Path]
) -> None:
    """The Python of an environment is a link to one without the environment."""
    recipe = tiny_grpo("run")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    config = load_recipe(recipe, ["stages.0.rollout.python=env/python"])
    stage = config.stages[0]
    assert stage.type == "grpo"
    assert stage.rollout.python == str(tmp_path / "env" / "python")


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_does_not_draw_at_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature {temperature:g}: vLLM draws at 0.01 to 2, or 0"):
        RolloutConfig(engine="vllm", sampling=SamplingConfig(temperature=temperature))
    RolloutConfig(engine="vllm", sampling=SamplingConfig(temperature=0))
    RolloutConfig(engine="native", sampling=SamplingConfig(temperature=temperature))
