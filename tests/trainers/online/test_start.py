"""How an online stage begins and goes on: no place on a busy cluster, a stop before the first weights, another run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from raylign.cluster.config import Resources
from raylign.cluster.errors import DoesNotFit, RunFailed
from raylign.cluster.placement import place, release
from raylign.cluster.rundir import RunDir
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.model_state import ModelState, StageOutcome
from raylign.trainers.online.stage import run_online_stage
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe


def train(path: Path, storage: Path, **changes: Any) -> tuple[RunDir, StageOutcome]:
    """The recipe's only stage, without what a run does around it."""
    config = load_recipe(path).model_copy(update=changes)
    run = open_run(config, storage, named=True, resume=True)
    inputs = read_inputs(config, run.path)
    model = ModelState(inputs.model)
    stage, given = config.stages[0], inputs.stages[0]
    return run, run_online_stage(config, stage, 0, model, given, inputs.tokenizer, run, lambda *_: None)


def test_a_busy_cluster_is_said_and_nothing_stays(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    from ray.util import placement_group_table

    room = ray.available_resources()["CPU"]  # what other tests leave behind, their service for one, stays
    taken = place("somebody-else", Resources(cpus=room - 0.25), timeout=60)
    try:
        path = tiny_grpo("busy", cluster="{wait_seconds: 2}")
        with pytest.raises(DoesNotFit, match=r"busy/grpo/policy-0 asked for 1 CPU and got no place within 2 s: .*free"):
            train(path, tmp_path)
        states = [g["state"] for g in placement_group_table().values() if g["name"].startswith("busy/")]
        assert set(states) <= {"REMOVED"}
    finally:
        release(taken)


def test_a_stop_before_the_first_weights_needs_no_checkpoint(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    path = tiny_grpo("early")
    run = open_run(load_recipe(path), tmp_path, named=True, resume=True)
    run.desire(stop=True)
    _, outcome = train(path, tmp_path)
    assert (outcome.stopped, outcome.steps, outcome.version) == (True, 0, 0)
    assert not (run / "checkpoints").exists()
    assert not (run / "adapters").exists()


def test_workers_load_while_roles_do_and_a_checkpoint_of_another_run_is_refused(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_grpo("other", stages__0__steps=1, stages__0__kl="null")
    told: list[set[tuple[str, str]]] = []
    update = RunDir.update_status

    def update_and_note(run: RunDir, **facts: Any) -> None:
        told.append({(wait["actor"], wait["what"]) for wait in facts.get("waiting", ())})
        update(run, **facts)

    monkeypatch.setattr(RunDir, "update_status", update_and_note)
    run, outcome = train(path, tmp_path)
    both = {("other/grpo/policy-0", "its start"), ("other/grpo/rollout-0", "loading the model")}
    assert any(both <= waits for waits in told)
    assert outcome.steps == 1
    assert len(run.events("checkpoint")) == 1
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(9)))
    with pytest.raises(RunFailed, match=r"step-000001 was made with rows 10, and this run has 9: put model, data"):
        train(path, tmp_path)
    assert json.loads((run / "checkpoints/0-grpo/step-000001/state.json").read_text())["rows"] == 10
