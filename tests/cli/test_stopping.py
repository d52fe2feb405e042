"""Ctrl-C, `stop` and `scale` where no run is on Ray: while inputs are prepared, while a job waits, and of lost runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from raylign.cluster.rundir import RunDir
from raylign.cluster.submission import Submission
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe

from .conftest import Command

RECIPE = """\
name: small
model: {path: ./model}
prepare: {path: "make.py:prepare"}
stages:
  - type: grpo
    data: {path: prompts.jsonl}
    rollout: {workers: {min: 1, max: 4, start: 2}}
    rewards: [{type: format, pattern: "4"}]
cluster: {cpus: 8}
"""

NEVER_DONE = """\
import threading

def prepare(out, seed):
    (out.parent / "began").touch()
    threading.Event().wait()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "make.py").write_text(NEVER_DONE)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def lost(recipe: Path, tmp_path: Path) -> RunDir:
    """A run that says it is running on this machine, and no process holds it."""
    made = open_run(load_recipe(recipe), tmp_path / "runs", named=True, resume=False)
    made.update_status(status="running", stage="grpo", step=3, steps=100, host=socket.gethostname())
    return made


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def test_ctrl_c_while_data_is_prepared_stops_the_run_and_starts_no_ray(recipe: Path) -> None:
    command = [sys.executable, "-m", "raylign.cli", "run", str(recipe), "--json"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=recipe.parent, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    run = recipe.parent / "runs" / "small"
    try:
        _wait_for(run / "began", process)
        assert json.loads((run / "status.json").read_text())["status"] == "preparing"
        below = psutil.Process(process.pid).children(recursive=True)
        assert below
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C is for all of its processes
        out, err = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 1, err
    assert json.loads(out)["status"] == "stopped"
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    assert "connecting to Ray" not in err
    assert "error" not in err
    assert not any(child.is_running() for child in below)


@pytest.mark.parametrize("arguments", [("stop", "small"), ("scale", "small", "--rollout", "3")])
def test_a_lost_run_is_called_lost_at_once(raylign: Command, lost: RunDir, arguments: tuple[str, ...]) -> None:
    ended = raylign(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert "run 'small' is lost" in ended.said
    assert "`raylign resume small` goes on" in ended.said
    assert lost.desired() == {}


def test_a_scale_that_does_not_come_about_fails(raylign: Command, lost: RunDir) -> None:
    with lost.hold():
        ended = raylign("scale", "small", "--rollout", "3", "--timeout", "0.1")
    assert ended.code == 1
    assert "has 0 rollout workers after 0.1 s, 3 are asked for (stage grpo)" in ended.said
    assert lost.desired() == {"rollout": 3}


def test_hints_name_a_storage_that_is_not_the_default(raylign: Command, lost: RunDir, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    lost.path.parent.rename(elsewhere)
    ended = raylign("stop", "small", "--storage", elsewhere)
    assert f"`raylign resume small --storage '{elsewhere}'` goes on" in ended.said


def test_a_job_that_waits_for_its_place_is_stopped_through_its_cluster(
    raylign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylign.cluster import jobs

    asked: list[str] = []

    class OneJob:
        """A cluster with one job, which ends when asked to."""

        def __init__(self, address: str) -> None:
            self.address = address

        def stop(self, submission_id: str) -> bool:
            asked.append(submission_id)
            return True

        def status(self, submission_id: str) -> jobs.Job:
            return jobs.Job(submission_id, "small", 1, "stopped" if asked else "pending")

    monkeypatch.setattr(jobs, "Jobs", OneJob)
    Submission("small", "http://127.0.0.1:8265", "raylign-small-1", ("raylign-small-1",), str(tmp_path / "runs")).save()
    ended = raylign("stop", "small", "--json")
    assert (ended.code, json.loads(ended.out)["status"]) == (0, "stopped")
    assert asked == ["raylign-small-1"]
