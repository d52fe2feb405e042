"""Text from runs, models and data in a terminal: it is shown; it commands nothing and is no markup."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from raylign.cli.output import plain
from raylign.cluster.rundir import RunDir

from .conftest import Command

EVIL = "\x1b]0;renamed\x07\x1b[2J[/bold]\x1b]52;c;Y2F0\x07 \x9b31m\u202eabc"
"""Names the window, clears the screen, fills the clipboard, turns text round, and closes a tag that was not opened."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "demo")
    run.path.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: demo\n")
    (run / "run.log").write_text(f"\x1b[32mgreen\x1b[0m {EVIL}\n")
    alarm = {"name": EVIL, "saw": EVIL, "attempt": EVIL}
    run.update_status(status="failed", reason=EVIL, stage="grpo", step=1, steps=2, alarms=[alarm])
    return run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("größer 漢字 🦀", "größer 漢字 🦀"),
    ],
)
def test_what_commands_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_colours_may_stay_and_nothing_else() -> None:
    assert plain("\x1b[31mred\x1b[0m\x1b[2J", colours=True) == "\x1b[31mred\x1b[0m\\x1b[2J"


@pytest.mark.parametrize("verb", ["status", "top", "why"])
def test_verbs_show_it_as_text(raylign: Command, run: RunDir, verb: str) -> None:
    ended = raylign(verb, "demo")
    assert ended.code == 0
    assert not set("\x1b\x07\x9b\u202e") & set(ended.out + ended.err)
    if verb != "why":
        assert r"\x1b]0;renamed" in ended.out
        assert r"\x1b[2J[/bold]\x1b]52;c;Y2F0" in ended.out


def test_an_error_shows_it_as_text(raylign: Command, tmp_path: Path) -> None:
    ended = raylign("status", f"x{EVIL}")
    assert ended.code == 4
    assert not set("\x1b\x07\x9b\u202e") & set(ended.err)
    assert "[/bold]" in ended.said


def test_logs_give_a_pipe_every_byte_and_a_terminal_none_that_commands_it(run: RunDir) -> None:
    command = [sys.executable, "-m", "raylign.cli", "logs", "demo", "--storage", str(run.path.parent)]
    piped = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert piped == (run / "run.log").read_bytes()
    main, terminal = pty.openpty()
    subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, timeout=60, check=True)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert b"\x1b[32mgreen\x1b[0m" in shown
    assert b"\\x1b]0;renamed\\x07\\x1b[2J[/bold]" in shown
    assert b"\x07" not in shown
    assert shown.count(b"\x1b") == 2
