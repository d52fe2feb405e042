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
from raylign.cluster.rundir import RunDir
from raylign.trainers.launch import launch
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe


@pytest.fixture
def begin(
    tmp_path: Path, tiny_grpo: Callable[..., Path], ray_session: str
) -> Callable[..., tuple[RunDir, dict[str, Any]]]:
    """Start a run, or go on with it, as `raylign run` and `resume` do."""
    hurried = {
        "stages__0__kl": "null",
        "stages__0__checkpoint_every": 2,
        "stages__0__rollout__resources": "{cpus: 3}",
        "stages__0__rollout__timeout_seconds": 5,
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


def test_a_policy_that_hangs_is_started_anew_and_one_that_dies_too_often_ends_the_run(
    begin: Callable[..., tuple[RunDir, dict[str, Any]]], tmp_path: Path
) -> None:
    _, undisturbed = begin("calm", 8)
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
        begin("dies", 8, stages__0__max_failures=1, stages__0__timeout_seconds=5, stages__0__checkpoint_every=8)
    assert [e["roles"] for e in run.events("role_lost")] == [["policy-0"]]
    assert RunFailed.exit_code == RaylignError.exit_code == 1
    failed = run.summary()
    assert failed["status"] == "failed"
    assert f"`raylign resume dies --storage {tmp_path}` begins it again" in failed["reason"]
    _, resumed = begin("dies", 8, resume=True)
    assert resumed["status"] == "succeeded"
    assert resumed["weights"] == undisturbed["weights"]


def test_a_hung_worker_and_a_dead_reward_are_replaced_and_a_worker_without_a_place_holds_nobody_up(
    begin: Callable[..., tuple[RunDir, dict[str, Any]]], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "full")
    hung: list[psutil.Process] = []
    asked_to_stop: list[float] = []

    def trouble() -> None:
        until("a step is done", lambda: bool(run.all_metrics()))
        run.desire(rollout=3)  # of 8 CPUs the roles have 1.5: there is room for two workers of 3
        until("two work", lambda: run.status().get("workers", {}).get("rollout") == 2)
        assert run.status()["wanted"] == {"rollout": 3}
        hung.append(psutil.Process(pid_of("full/grpo/rollout-0")))
        hung[0].suspend()
        until("the hung one is missed", lambda: bool(run.events("worker_lost")))
        done = len(run.all_metrics())
        until("the run goes on", lambda: len(run.all_metrics()) > done + 1)
        os.kill(pid_of("full/grpo/reward-0"), signal.SIGKILL)  # Ray starts it again and asks again
        done = len(run.all_metrics())
        until("it goes on again", lambda: len(run.all_metrics()) > done + 2)
        asked_to_stop.append(time.monotonic())
        run.desire(stop=True)

    with meanwhile(trouble):
        _, summary = begin("full", 100_000)
    assert summary["status"] == "stopped"
    assert time.monotonic() - asked_to_stop[0] < 20
    lost = run.events("worker_lost")
    assert [e["worker"] for e in lost] == ["full/grpo/rollout-0"]
    until("the hung process is gone", lambda: not hung[0].is_running() or hung[0].status() == psutil.STATUS_ZOMBIE, 30)
