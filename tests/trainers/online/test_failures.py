"""What goes wrong in the online loop on real Ray: a worker hangs or finds no place, a reward or the policy dies."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import RaylignError, RunFailed
from raylign.cluster.rundir import RunDir, read_lines
from raylign.trainers.launch import launch
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe

STEPS = 100_000
"""More than any run here lives to make: none reaches a checkpoint."""


@pytest.fixture
def begin(
    tmp_path: Path, tiny_grpo: Callable[..., Path], ray_session: str
) -> Callable[..., tuple[RunDir, dict[str, Any]]]:
    """Start a run, or go on with it, as `raylign run` and `resume` do."""
    hurried = {
        "stages__0__kl": "null",
        "stages__0__checkpoint_every": STEPS,
        "stages__0__rollout__resources": "{cpus: 3}",
        "stages__0__rollout__timeout_seconds": 5,
        "stages__0__scoring": "{workers: {min: 1, max: 2, start: 1}}",
        "stages__0__rewards": "[{type: function, path: 'rewards.py:held'}]",
        "cluster": "{wait_seconds: 30, cpus: 8}",
    }

    def begin(name: str, steps: int, *, resume: bool = False, **more: Any) -> tuple[RunDir, dict[str, Any]]:
        path = tiny_grpo(name, stages__0__steps=steps, **hurried | more)
        run = open_run(load_recipe(path), tmp_path, named=True, resume=resume)
        return run, launch(load_recipe(path), run, lambda _: None)

    return begin


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread of its own while the block runs; raises what it raised."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)
    if errors:
        raise errors[0]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep the run from ending meanwhile: no reward answers."""
    (folder / "hold").touch()
    yield
    (folder / "hold").unlink()


def until(what: str, holds: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"no sign that {what}"
        time.sleep(0.02)


def pid_of(actor: str) -> int:
    from ray._private.state import actors

    return next(a["Pid"] for a in actors(actor_state_name="ALIVE").values() if a["Name"] == actor)


@pytest.mark.slow
def test_a_policy_that_dies_too_often_ends_the_run_and_a_resume_begins_the_same_again(
    begin: Callable[..., tuple[RunDir, dict[str, Any]]], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "dies")

    def hang_and_kill() -> None:
        until("three steps are done", lambda: len(run.all_metrics()) >= 3)
        with held(tmp_path):
            os.kill(pid_of("dies/grpo/policy-0"), signal.SIGSTOP)
        until("it is missed", lambda: bool(run.events("role_lost")))
        with held(tmp_path):
            until("it is replaced", lambda: bool(run.events("resumed")))
            os.kill(pid_of("dies/grpo/policy-0"), signal.SIGKILL)
            until("that is noticed", lambda: bool(run.summary()))

    with (
        meanwhile(hang_and_kill),
        pytest.raises(RunFailed, match=r"policy-0 was lost during .*; stage grpo has no checkpoint yet"),
    ):
        begin("dies", STEPS, stages__0__max_failures=1, stages__0__timeout_seconds=5)
    assert [e["roles"] for e in run.events("role_lost")] == [["policy-0"]]
    assert RunFailed.exit_code == RaylignError.exit_code == 1
    failed = run.summary()
    assert failed["status"] == "failed"
    assert f"`raylign resume dies --storage {tmp_path}` begins it again" in failed["reason"]
    before = learned(run)
    assert len(before) >= 3
    disturb_and_stop(begin, run, tmp_path, len(before))
    assert learned(run)[: len(before)] == before


def learned(run: RunDir) -> list[tuple[float, ...]]:
    """What came of each step, the later time where it was made twice."""
    return [tuple(m[key] for key in ("step", "reward/mean", "loss", "entropy", "grad_norm")) for m in run.all_metrics()]


def disturb_and_stop(begin: Callable[..., Any], run: RunDir, tmp_path: Path, again: int) -> None:
    """Go on with the run while a scorer comes and goes, a worker finds no place, another hangs, and the reward dies;
    stop it after `again` steps or more."""
    hung: list[psutil.Process] = []
    asked_to_stop: list[float] = []
    began = len(list(read_lines(run / "metrics.jsonl")))

    def made() -> int:
        return len(list(read_lines(run / "metrics.jsonl"))) - began

    def have(role: str) -> int:
        return run.status().get("workers", {}).get(role, 0)

    def trouble() -> None:
        until("a step is done", lambda: made() > 0)
        run.desire(rollout=3, reward=2)  # of 8 CPUs the roles have 2: there is room for two workers of 3
        until("two work", lambda: have("rollout") == 2 == have("reward"))
        assert run.status()["wanted"] == {"rollout": 3, "reward": 2}
        hung.append(psutil.Process(pid_of("dies/grpo/rollout-0")))
        hung[0].suspend()
        until("the hung one is missed", lambda: bool(run.events("worker_lost")))
        done = made()
        until("the run goes on", lambda: made() > done + 1)
        run.desire(reward=1)
        until("a scorer leaves", lambda: have("reward") == 1 and bool(run.events("scorer_left")))
        os.kill(pid_of("dies/grpo/reward-0"), signal.SIGKILL)  # Ray starts it again and asks again
        done = made()
        until("it goes on again", lambda: made() > max(done + 2, again))
        asked_to_stop.append(time.monotonic())
        run.desire(stop=True)

    with meanwhile(trouble):
        _, summary = begin("dies", STEPS, resume=True)
    assert summary["status"] == "stopped"
    assert time.monotonic() - asked_to_stop[0] < 20
    assert [e["worker"] for e in run.events("worker_lost")] == ["dies/grpo/rollout-0"]
    until("the hung process is gone", lambda: not hung[0].is_running() or hung[0].status() == psutil.STATUS_ZOMBIE, 30)
