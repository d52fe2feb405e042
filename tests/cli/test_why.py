"""`raylign why`: of a run with a stopped worker, of one whose reward hangs, and of runs that are not running."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe

from .conftest import Command

HELD = '[{type: function, path: "rewards.py:held", timeout_seconds: 600}]'


def why(run: RunDir, *options: str) -> str:
    """What the command prints, run as users do: in another process, which knows only the storage."""
    command = [sys.executable, "-m", "raylign.cli", "why", run.name, "--storage", str(run.path.parent), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def until(what: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"no sign that {what}"
        time.sleep(0.05)
    return found


def pid_of(actor: str) -> int:
    from ray._private.state import actors

    return next(a["Pid"] for a in actors(actor_state_name="ALIVE").values() if a["Name"] == actor)


@pytest.fixture
def held(tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path) -> Iterator[RunDir]:
    """A run of long completions, whose rewards wait while the file `hold` is there."""
    (tmp_path / "hold").touch()
    settings = {"sampling__max_tokens": 2000, "workers": 1, "health_seconds": 120}
    path = tiny_grpo(
        "held",
        stages__0__rewards=HELD,
        stages__0__kl="null",
        **{f"stages__0__rollout__{key}": value for key, value in settings.items()},
    )
    config = load_recipe(path)
    run = open_run(config, tmp_path, named=True, resume=False)
    given = (config, run, read_inputs(config, run.path), lambda _: None)
    thread = threading.Thread(target=run_recipe, args=given, daemon=True)
    thread.start()
    yield run
    run.desire(stop=True)
    (tmp_path / "hold").unlink()
    thread.join(timeout=120)
    assert run.status()["status"] == "stopped"


def waits(run: RunDir) -> list[str]:
    return [wait["what"] for wait in run.status().get("waiting", [])]


def test_it_names_group_worker_node_and_seconds_of_what_is_slow(held: RunDir, tmp_path: Path) -> None:
    import ray

    node = f"{ray.nodes()[0]['NodeManagerAddress']}/{ray.nodes()[0]['NodeID'][-6:]}"
    until("groups are running", lambda: "step 0 group 0" in waits(held))
    worker = psutil.Process(pid_of("held/grpo/rollout-0"))
    worker.suspend()
    try:
        until("its silence is noticed", lambda: "a sign of life" in waits(held))
        facts = json.loads(why(held, "--json"))
        table = why(held)
    finally:
        worker.resume()
    assert (facts["run"], facts["running"], facts["stage"], facts["step"]) == ("held", True, "grpo", 0)
    group = next(w for w in facts["waiting"] if w["what"].startswith("step 0 group "))
    assert group["seconds"] > 3
    assert {(w["actor"], w["node"]) for w in facts["waiting"]} == {("held/grpo/rollout-0", node)}
    seconds = [w["seconds"] for w in facts["waiting"]]
    assert seconds == sorted(seconds, reverse=True)
    for word in ("held (grpo 0/4) waits for", "step 0 group", "held/grpo/rollout-0", node, "a sign of life"):
        assert word in table

    until("rewards are waited for", lambda: any(w.startswith("the reward of step 0 group ") for w in waits(held)))
    (wait,) = [w for w in json.loads(why(held, "--json"))["waiting"] if w["what"].startswith("the reward")]
    assert (wait["actor"], wait["node"]) == ("held/grpo/reward-0", node)


# ---- without a running run


@pytest.fixture
def idle(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "idle")
    run.path.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: idle\n")
    return run


def test_an_unknown_run_is_not_found(raylign: Command, idle: RunDir) -> None:
    ended = raylign("why", "other")
    assert ended.code == 4
    assert "no run 'other'" in ended.said
    assert "there are idle" in ended.said


def test_a_run_that_does_not_run_waits_for_nothing(raylign: Command, idle: RunDir) -> None:
    wait = {"what": "the update of step 3", "actor": "policy-0", "node": "n", "since": 1.0}
    idle.update_status(status="failed", stage="grpo", step=3, steps=9, waiting=[wait])
    ended = raylign("why", "idle")
    assert (ended.code, ended.out) == (0, "idle is not running: failed\n")
    facts = json.loads(raylign("why", "idle", "--json").out)
    assert (facts["running"], facts["status"], facts["waiting"]) == (False, "failed", [])


def test_a_run_whose_process_is_gone_is_lost(raylign: Command, idle: RunDir) -> None:
    idle.update_status(status="running", host=os.uname().nodename)
    assert raylign("why", "idle").out == "idle is not running: lost\n"


def test_a_controller_that_says_nothing_is_what_is_waited_for(raylign: Command, idle: RunDir) -> None:
    wait = {"what": "the update of step 3", "actor": "policy-0", "node": "n", "since": time.time() - 100}
    silent = time.time() - 50
    with idle.hold():
        idle.restore_status({"status": "running", "stage": "grpo", "step": 3, "steps": 9, "waiting": [wait]})
        idle.restore_status(idle.status() | {"updated": silent, "host": "head"})
        facts = json.loads(raylign("why", "idle", "--json").out)
        assert [(w["what"], w["actor"], w["node"]) for w in facts["waiting"]] == [
            ("the update of step 3", "policy-0", "n"),
            ("a report of the run", "controller", "head"),
        ]
        assert 50 <= facts["waiting"][1]["seconds"] < 80
        idle.restore_status(idle.status() | {"stage": "sft", "waiting": []})
        assert "the end of step 3 of sft" in raylign("why", "idle").out
