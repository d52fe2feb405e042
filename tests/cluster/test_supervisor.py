"""The supervisor on real processes: who is started again, what is cleared away, how it ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from raylign.cluster.errors import InputError
from raylign.cluster.rundir import RunDir
from raylign.cluster.supervisor import Attempt

PROGRAM = """\
import os, signal, subprocess, sys
from pathlib import Path
from raylign.cluster.config import ControllerConfig
from raylign.cluster.rundir import RunDir
from raylign.cluster.supervisor import supervised

run = RunDir(Path(sys.argv[1]))
config = ControllerConfig(max_restarts=2, pause_seconds=0.01, hang_seconds=0.5)
held = run.hold()
held.__enter__()
this = supervised(run, config, lambda text: print(text, file=sys.stderr, flush=True))
heavy = [name for name in ("ray", "torch", "numpy") if name in sys.modules]
run.event("began", again=this.again, pid=os.getpid(), parent=os.getppid(), heavy=heavy)
run.update_status(status="running", pid=os.getpid())
attempt = len(run.events("began"))
with run.hold():
    pass
{work}
"""

ORPHAN = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
END = "run.update_status(status='succeeded')"
CHECKPOINT = "(run / 'checkpoints' / '0-grpo' / f'step-{attempt}').mkdir(parents=True)"

Start = Callable[[str], tuple["subprocess.Popen[str]", RunDir]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a supervised process that does so; `attempt` counts from 1."""

    def start(work: str) -> tuple["subprocess.Popen[str]", RunDir]:
        (tmp_path / "run").mkdir()
        program = PROGRAM.format(work=work)
        command = [sys.executable, "-c", program, str(tmp_path / "run")]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True), RunDir(tmp_path / "run")

    return start


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


def test_a_killed_controller_is_started_again_and_leaves_nothing(start: Start) -> None:
    process, run = start(
        f"if attempt == 1:\n    child = {ORPHAN}\n    run.event('orphan', pid=child.pid)\n    {KILL}\n{END}"
    )
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert "the controller was ended by SIGKILL: starting it again in 0.01 s (1 of 2)" in said
    first, second = run.events("began")
    assert (first["again"], second["again"]) == (False, True)
    assert first["parent"] == second["parent"] == process.pid
    assert first["heavy"] == []
    assert not psutil.pid_exists(run.events("orphan")[0]["pid"])
    assert [e["reason"] for e in run.events("controller_lost")] == ["it was ended by SIGKILL"]
    assert run.status()["controller_restarts"] == 1


def test_deaths_without_a_checkpoint_in_between_are_counted_and_bounded(start: Start) -> None:
    process, run = start(f"if attempt < 4:\n    {CHECKPOINT}\n{KILL}")
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert len(run.events("began")) == 3 + 2  # three with a checkpoint each, and two restarts after the last of these
    assert "was ended by SIGKILL, 3 times now without a new checkpoint: `raylign resume run" in said


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_what_a_controller_says_itself_is_passed_on(start: Start, code: int) -> None:
    process, run = start(f"run.update_status(status='failed')\nsys.exit({code})")
    process.communicate(timeout=30)
    assert process.returncode == code
    assert len(run.events("began")) == 1


def test_one_that_ends_without_a_word_died(start: Start) -> None:
    process, run = start(f"if attempt == 1:\n    os._exit(1)\n{END}")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(run.events("began")) == 2


def test_one_that_cannot_write_down_its_end_is_believed(start: Start) -> None:
    process, run = start("this.end()\nsys.exit(1)")
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert len(run.events("began")) == 1


def test_what_nobody_foresaw_is_tried_once_more_until_there_is_a_new_checkpoint(start: Start) -> None:
    process, run = start(
        f"if attempt == 2:\n    {CHECKPOINT}\n"
        "if not this.may_die():\n    run.update_status(status='failed')\n"
        "sys.exit(1)"
    )
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert len(run.events("began")) == 3  # the second had made a checkpoint, the third had not
    assert said.count("the controller ended with code 1 before the run did: starting it again") == 2
    assert run.status()["status"] == "failed"


def test_who_is_asked_to_stop_or_has_no_supervisor_does_not_die(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert Attempt(run=run).may_die()
    run.desire(stop=True)
    assert not Attempt(run=run).may_die()
    assert not Attempt().may_die()


def test_a_suspended_controller_counts_as_dead(start: Start) -> None:
    process, run = start(f"if attempt == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n{END}")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(run.events("began")) == 2


def test_a_signal_reaches_the_controller_and_its_end_is_no_death(start: Start) -> None:
    process, run = start("signal.pause()")
    wait_for("controller", lambda: bool(run.events("began")))
    assert run.held()
    with pytest.raises(InputError, match="'run' is running already"), run.hold():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(run.events("began")) == 1


def test_a_killed_supervisor_stops_its_run(start: Start) -> None:
    process, run = start(
        "signal.signal(signal.SIGTERM, lambda *_: (run.event('stopped'), sys.exit()))\n"
        "run.event('ready')\nsignal.pause()"
    )
    wait_for("controller", lambda: bool(run.events("ready")))
    process.kill()
    process.communicate(timeout=30)
    wait_for("end of the controller", lambda: not psutil.pid_exists(run.events("began")[0]["pid"]))
    assert run.events("stopped")
