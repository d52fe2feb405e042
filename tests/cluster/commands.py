"""The command as a user's shell has it, and waiting for what a run comes to."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from raylign.cluster.rundir import RunDir


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def raylign(*arguments: str | Path, home: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raylign.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def wait_until(what: str, holds: Callable[[], bool], run: RunDir, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        status = run.status()
        assert status.get("status") != "failed", f"failed before {what}: {status}"
        assert time.monotonic() < deadline, f"no sign that {what}: {status}"
        time.sleep(0.1)
