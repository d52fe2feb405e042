"""Run directories as the verbs find them: foreign, damaged, finished; what is refused, kept, and never removed."""

import json
from pathlib import Path

import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers import pipeline
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe
from raylign.trainers.shipping import keep

from .conftest import Command

RECIPE = """\
name: small
model: {path: ./model}
stages:
  - type: grpo
    data: {path: prompts.jsonl}
    rollout: {workers: {min: 1, max: 4, start: 2}}
    rewards: [{type: format, pattern: "4"}]
cluster: {cpus: 8}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> RunDir:
    return open_run(load_recipe(recipe), tmp_path / "runs", named=True, resume=False)


@pytest.mark.parametrize("resume", ["--resume", "--json"])
def test_a_folder_that_is_no_runs_is_refused_and_stays(raylign: Command, recipe: Path, resume: str) -> None:
    thesis = recipe.parent / "runs" / "small" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years")
    ended = raylign("run", recipe, "--name", "small", resume)
    assert ended.code == 2
    assert "is there and is no run's: it has no recipe.yaml" in ended.said
    assert [p.name for p in thesis.parent.iterdir()] == ["thesis.txt"]


def test_a_run_that_lost_its_status_is_not_removed_by_a_refusal(raylign: Command, recipe: Path, run: RunDir) -> None:
    (run / "checkpoints" / "0-grpo" / "step-000010").mkdir(parents=True)
    ended = raylign("run", recipe, "--resume")
    assert ended.code == 2
    assert "no model folder" in ended.said
    assert (run / "checkpoints" / "0-grpo" / "step-000010").is_dir()
    assert not (run / "status.json").exists()


def test_the_registrys_name_is_no_runs(raylign: Command, recipe: Path) -> None:
    for arguments in (("run", recipe, "--name", "registry"), ("submit", recipe, "--name", "registry")):
        ended = raylign(*arguments)
        assert ended.code == 2
        assert "cannot be called 'registry'" in ended.said
    assert not (recipe.parent / "runs").exists()


def test_one_damaged_run_does_not_hide_the_others(raylign: Command, run: RunDir, tmp_path: Path) -> None:
    run.update_status(status="stopped", dashboard="http://127.0.0.1:1234")
    bad = tmp_path / "runs" / "torn"
    bad.mkdir()
    (bad / "recipe.yaml").write_text(RECIPE)
    (bad / "status.json").write_text('{"status": "ru')
    listed = {f["run"]: f for f in json.loads(raylign("status", "--json").out)}
    assert (listed["small"]["status"], listed["small"]["dashboard"]) == ("stopped", "http://127.0.0.1:1234")
    assert listed["torn"]["status"] == "damaged"
    assert raylign("status").code == 0
    ended = raylign("status", "torn")
    assert ended.code == 2
    assert f"{bad / 'status.json'} is damaged" in ended.said


def test_damaged_progress_is_named(raylign: Command, run: RunDir) -> None:
    for text in ("[{", '[{"nam": 1}]'):
        (run / "progress.json").write_text(text)
        with pytest.raises(ValueError, match=r"progress\.json"):
            pipeline.finished(run)


def test_a_run_that_has_succeeded_is_not_started_again(raylign: Command, run: RunDir) -> None:
    summary = pipeline.conclude(load_recipe(run / "recipe.yaml"), run, "succeeded", "")
    ended = raylign("resume", "small", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == summary
    assert "has succeeded already" in ended.err


def test_a_report_that_fails_leaves_the_run_succeeded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: RunDir) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pipeline, "write_report", broken)
    summary = pipeline.conclude(load_recipe(run / "recipe.yaml"), run, "succeeded", "")
    assert summary["status"] == run.status()["status"] == "succeeded"
    assert run.events("report_failed")[0]["reason"] == "RuntimeError: no fonts"


def test_a_full_disk_is_one_line_with_the_last_checkpoint(
    raylign: Command, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylign.trainers import launch

    (run / "checkpoints" / "0-grpo" / "step-000010").mkdir(parents=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launch, "_prove", lambda *_: None)
    monkeypatch.setattr(launch, "_work", full)
    monkeypatch.setattr(launch, "conclude", full)
    ended = raylign("resume", "small")
    assert ended.code == 1
    assert "RunFailed: OSError: [Errno 28] No space left on device" in ended.said
    assert "the last checkpoint is checkpoints/0-grpo/step-000010: `raylign resume small` goes on from it" in ended.said


def test_restarts_and_workers_before_a_stop_are_kept(run: RunDir) -> None:
    from raylign.trainers.model_state import ModelState, StageOutcome

    config = load_recipe(run / "recipe.yaml")
    run.update_status(unfinished={"grpo": {"restarts": 2, "workers": (1, 4)}}, wall_seconds=9.0, peak_memory_gb=1.5)
    summary = pipeline.conclude(config, run, "stopped", "")
    assert (summary["restarts"], summary["workers"]) == (2, {"min": 1, "max": 4})
    assert (summary["wall_seconds"], summary["peak_memory_gb"]) == (9.0, 1.5)
    outcome = StageOutcome(model=ModelState(run.path), restarts=1, workers=(2, 2))
    joined = pipeline._with_earlier(outcome, "grpo", run)
    assert (joined.restarts, joined.workers) == (3, (1, 4))


def test_a_jobs_url_in_the_environment_is_named(
    raylign: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("run", "check"):
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
        ended = raylign(verb, recipe)
        assert ended.code == 2
        assert "the environment has RAY_ADDRESS=http://127.0.0.1:8265, which is a jobs URL" in ended.said


def test_a_recipes_folder_that_holds_the_runs_is_kept_without_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    for storage in (recipe.parent / "runs", recipe.parent):
        made = open_run(load_recipe(recipe), storage, named=False, resume=False)
        config = keep(recipe, [], made)
        assert [p.name for p in (made / "source").iterdir() if p.name != "runs"] == ["small.yaml"]
        assert config.model.path == str(made / "source" / "model")
