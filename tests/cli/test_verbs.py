"""The verbs where no run is at work: names that are not there, names that are taken, JSON, and what is not imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import InputError
from raylign.cluster.rundir import RunDir
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe

from .conftest import Command

RECIPE = """\
name: small
model: {path: ./model}
stages:
  - type: grpo
    data: {path: prompts.jsonl}
    rollout: {workers: {min: 1, max: 4, start: 2}}
    rewards:
      - {type: format, pattern: "4"}
serve: {alias: small}
cluster: {cpus: 8}
"""

WITHOUT_HEAVY_IMPORTS = """\
import sys
from raylign.cli.main import main
try:
    main()
finally:
    heavy = {"ray", "torch", "transformers", "trl", "peft", "pandas"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> RunDir:
    """A run that was stopped in its third step."""
    made = open_run(load_recipe(recipe), tmp_path / "runs", named=True, resume=False)
    made.update_status(status="stopped", stage="grpo", step=3, steps=100, metrics={"reward/mean": 0.5})
    return made


# ---- names


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "smal"),
        ("stop", "smal"),
        ("resume", "smal"),
        ("scale", "smal", "--rollout", "2"),
        ("logs", "smal"),
        ("serve", "smal"),
    ],
)
def test_an_unknown_run_is_told_the_names_there_are(raylign: Command, run: RunDir, arguments: tuple[str, ...]) -> None:
    ended = raylign(*arguments)
    assert (ended.code, ended.out) == (4, "")
    assert "no run 'smal'" in ended.said
    assert "there are small" in ended.said


def test_a_question_without_a_service_says_how_to_start_one(raylign: Command) -> None:
    ended = raylign("query", "nobody", "Hello")
    assert (ended.code, ended.out) == (4, "")
    assert "raylign serve RUN" in ended.said


def test_a_run_that_has_published_nothing_cannot_be_served(raylign: Command, run: RunDir) -> None:
    ended = raylign("serve", "small")
    assert ended.code == 4
    assert "has published nothing to serve (it is stopped)" in ended.said


def test_the_recipes_own_name_takes_the_next_free_one(recipe: Path, tmp_path: Path) -> None:
    config, storage = load_recipe(recipe), tmp_path / "runs"
    made = [open_run(config, storage, named=False, resume=False) for _ in range(3)]
    assert [r.name for r in made] == ["small", "small-2", "small-3"]
    assert [load_recipe(r / "recipe.yaml").name for r in made] == ["small", "small-2", "small-3"]


def test_a_name_that_was_asked_for_and_is_taken_is_refused(raylign: Command, recipe: Path, run: RunDir) -> None:
    before = (run / "recipe.yaml").read_text()
    ended = raylign("run", recipe, "--name", "small")
    assert (ended.code, ended.out) == (2, "")
    assert "run 'small' exists" in ended.said
    assert "(stopped): `raylign resume small` goes on with it, or take another --name" in ended.said
    assert (run / "recipe.yaml").read_text() == before


def test_storage_that_cannot_be_written_is_named(raylign: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = raylign("run", recipe, "--storage", tmp_path / "file")
    assert ended.code == 2
    assert "cannot write runs to" in ended.said
    assert "--storage" in ended.said


# ---- going on


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=5", "began with seed 0 and the recipe now has seed 5"),
        (
            "stages.0.learning_rate=1e-3",
            "began with stages.0.learning_rate 1e-05 and the recipe now has stages.0.learning_rate 0.001",
        ),
        ("stages.0.kl={}", "began with no stages.0.kl.coefficient and the recipe now has stages.0.kl.coefficient 0.01"),
        ("stages.0.data.path=others.jsonl", "began with stages.0.data.path 'prompts.jsonl'"),
    ],
)
def test_a_run_does_not_go_on_with_another_experiment(
    raylign: Command, recipe: Path, run: RunDir, override: str, says: str
) -> None:
    before = (run / "recipe.yaml").read_text()
    ended = raylign("run", recipe, "--resume", "--set", override)
    assert ended.code == 2
    assert says in ended.said
    assert "begin another run with --name" in ended.said
    assert (run / "recipe.yaml").read_text() == before


def test_a_run_goes_on_with_other_workers_and_from_another_folder(recipe: Path, run: RunDir, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "small.yaml"
    moved.parent.mkdir()
    moved.write_text(RECIPE)
    overrides = ["stages.0.rollout.workers=1", "cluster.cpus=3", "stages.0.micro_batch_tokens=64"]
    again = open_run(load_recipe(moved, overrides), tmp_path / "runs", named=True, resume=True)
    assert again.path == run.path
    kept = load_recipe(run / "recipe.yaml")
    assert (kept.cluster.cpus, kept.stages[0].data.path) == (3, str(moved.parent / "prompts.jsonl"))


def test_a_refused_resume_leaves_the_run_as_it_was(raylign: Command, run: RunDir) -> None:
    before = run.status()
    ended = raylign("resume", "small")
    assert ended.code == 2
    assert "no model folder" in ended.said
    after = run.status()
    assert {**after, "updated": 0} == {**before, "updated": 0}


def test_an_edited_recipe_of_a_run_is_checked_when_it_goes_on(raylign: Command, run: RunDir) -> None:
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("type: grpo", "type: grop"))
    ended = raylign("resume", "small")
    assert ended.code == 2
    assert f"{path}:" in ended.said
    assert "did you mean 'grpo'?" in ended.said


def test_two_processes_never_work_on_one_run(recipe: Path, run: RunDir) -> None:
    with run.hold():
        for arguments in (["resume", "small"], ["run", str(recipe), "--resume"]):
            command = [sys.executable, "-m", "raylign.cli", *arguments]
            ended = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 2
            assert "run 'small' is running already: `raylign status small`" in ended.stderr
        with pytest.raises(InputError, match="running already"):
            open_run(load_recipe(recipe), run.path.parent, named=True, resume=True)


# ---- facts


def _json(raylign: Command, *arguments: str) -> Any:
    ended = raylign(*arguments, "--json")
    assert ended.code == 0
    return json.loads(ended.out)


def test_facts_are_json_and_nothing_else(raylign: Command, run: RunDir) -> None:
    facts = _json(raylign, "status", "small")
    assert (facts["run"], facts["status"], facts["stage"], facts["step"], facts["steps"]) == (
        "small",
        "stopped",
        "grpo",
        3,
        100,
    )
    assert {"workers", "metrics", "since"} <= set(facts)
    assert [f["run"] for f in _json(raylign, "status")] == ["small"]
    assert _json(raylign, "stop", "small") == {"run": "small", "status": "stopped", "step": 3}
    assert _json(raylign, "models") == []


def test_a_run_that_has_ended_cannot_be_scaled(raylign: Command, run: RunDir) -> None:
    ended = raylign("scale", "small", "--rollout", "3", "--json")
    assert (ended.code, ended.out) == (2, "")
    assert "has ended (stopped)" in ended.said


def test_scale_stays_in_the_recipes_bounds(raylign: Command, run: RunDir) -> None:
    run.update_status(status="running")
    ended = raylign("scale", "small", "--rollout", "9")
    assert ended.code == 2
    assert "--rollout 9 is outside the recipe's rollout.workers: min 1, max 4" in ended.said
    ended = raylign("scale", "small", "--rollout", "2", "--reward", "2")
    assert ended.code == 2
    assert "--reward 2 is outside the recipe's scoring.workers: min 1, max 1" in ended.said
    assert run.desired().keys().isdisjoint(("rollout", "reward"))


# ---- usage


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("rum",), ("status", "--jsn"), ("scale", "x"), ("scale", "x", "--rollout", "0"), ("run", "a", "b")],
)
def test_wrong_usage_exits_with_2_and_names_the_help(raylign: Command, arguments: tuple[str, ...]) -> None:
    ended = raylign(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Usage: raylign" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("run", "--help"), 0),
        (("run", "none.yaml"), 2),
        (("check", "small.yaml", "--set", "sed=1"), 2),
        (("status", "nobody"), 4),
        (("models", "--json"), 0),
    ],
)
def test_what_needs_no_heavy_import_does_without(recipe: Path, arguments: tuple[str, ...], code: int) -> None:
    """Help and recipe errors come back at once: neither torch nor ray is loaded on the way."""
    command = [sys.executable, "-c", WITHOUT_HEAVY_IMPORTS, *arguments]
    ended = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
