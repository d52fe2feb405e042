"""`raylign top` and `raylign report`: what runs do, seen while they do it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.report.live import sparkline

from .conftest import Command


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Three runs: one that has ended, one that is damaged, and one that another machine works on."""
    root = tmp_path / "runs"
    for name in ("ended", "broken", "working"):
        (root / name).mkdir(parents=True)
        (root / name / "recipe.yaml").write_text(f"name: {name}\n")
    RunDir(root / "ended").update_status(status="succeeded", stage="sft", step=9, steps=9)
    (root / "broken" / "status.json").write_text("{")
    run = RunDir(root / "working")
    run.metrics("sft", 0, {"loss": 9.0})
    for step, reward in enumerate((0.0, 0.25, 0.5, 1.0)):
        run.metrics("grpo", step, {"reward/mean": reward, "seconds/update": 0.5 + step, "loss": float("nan")})
    run.update_status(
        status="running",
        host="elsewhere",
        stage="grpo",
        step=4,
        steps=20,
        workers={"rollout": 1, "reward": 1},
        wanted={"rollout": 3},
        groups={"running": 2, "done": 6},
        waiting=[{"what": "step 4 group 1", "actor": "working/grpo/rollout-0", "node": "n", "since": time.time() - 7}],
        alarms=[{"name": "collapse", "saw": "s", "attempt": "a"}],
    )
    return root


def test_one_look_tells_of_every_run_those_at_work_first(raylign: Command, storage: Path) -> None:
    facts = json.loads(raylign("top", "--json").out)
    assert [(f["run"], f["status"]) for f in facts] == [
        ("working", "running"),
        ("broken", "damaged"),
        ("ended", "succeeded"),
    ]
    working = facts[0]
    assert working["curves"]["reward/mean"] == [0.0, 0.25, 0.5, 1.0]
    assert working["seconds"] == {"update": 3.5}
    assert (working["workers"], working["wanted"]) == ({"rollout": 1, "reward": 1}, {"rollout": 3})
    assert working["alarms"] == ["collapse"]
    assert "status.json is damaged" in facts[1]["reason"]
    assert facts[0].keys() == facts[1].keys() == facts[2].keys()


def test_on_a_pipe_it_is_one_look_for_a_person(raylign: Command, storage: Path) -> None:
    shown = raylign("top", "working").out
    assert "working  running  grpo 4/20  rollout 1 of 3, reward 1  alarm: collapse" in shown
    assert re.search(r"reward/mean +1 ▁▃▅█\n", shown)
    assert "seconds: update 3.50" in shown
    assert "groups: 2 running, 6 done" in shown
    assert re.search(r"waits (7|8)\.\d s for step 4 group 1 working/grpo/rollout-0", shown)
    assert "ended" not in shown


def test_no_run_and_an_unknown_run(raylign: Command, tmp_path: Path) -> None:
    assert "no runs here yet" in raylign("top", "--once").out
    assert raylign("top", "other").code == 4


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([0.0, 7.0, 3.0], "▁█▄"),
        ([5.0, 5.0], "▁▁"),
        ([0.0, float("nan"), 1.0], "▁ █"),
        ([float("nan")], " "),
        ([], ""),
        ([9.0, 9.0, 0.0, 1.0, 2.0, 3.0], "▁▃▆█"),
    ],
)
def test_bars_stand_between_the_least_and_the_most_of_what_is_shown(values: list[float], bars: str) -> None:
    assert sparkline(values, 4) == bars


def test_in_a_terminal_it_follows_the_run_and_gives_the_screen_back(storage: Path) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "raylign.cli", "top", "--storage", str(storage), "--every", "0.1"]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=env) as process:
        os.close(terminal)
        shown = _read_until(main, "", "grpo 4/20")
        assert "\x1b[?1049h" in shown
        RunDir(storage / "working").update_status(step=5)
        shown = _read_until(main, "", "grpo 5/20")
        process.send_signal(signal.SIGINT)
        shown = _read_until(main, shown, "\x1b[?1049l")
        assert process.wait(timeout=30) == 0
    assert "\x1b[?25h" in shown
    assert "Traceback" not in shown
    os.close(main)


def _read_until(terminal: int, seen: str, awaited: str, seconds: float = 60) -> str:
    give_up = time.monotonic() + seconds
    while awaited not in re.sub(r"\x1b\[[0-9;]*m", "", seen):
        ready, _, _ = select.select([terminal], [], [], max(0.0, give_up - time.monotonic()))
        assert ready, f"{awaited!r} did not come; seen: {seen[-2000:]!r}"
        try:
            seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            raise AssertionError(f"the terminal ended before {awaited!r}: {seen[-2000:]!r}") from None
    return seen


def test_a_report_is_written_at_any_time(raylign: Command, storage: Path) -> None:
    path = storage / "working" / "report.html"
    assert raylign("report", "working").out == f"{path}\n"
    first = path.read_text()
    assert "reward/mean" in first
    RunDir(storage / "working").update_status(status="failed", reason="the disk is full")
    assert json.loads(raylign("report", "working", "--json").out) == {"run": "working", "report": str(path)}
    assert "the disk is full" in path.read_text() != first
    assert raylign("report", "other").code == 4
