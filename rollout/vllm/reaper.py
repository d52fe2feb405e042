"""Ends vLLM's processes when the one that began them is killed: `python -m raylign.rollout.vllm.reaper PARENT`.

vLLM's engine process waits for ever for a parent that got SIGKILL, and keeps its memory. The parent holds the other end
of this process's standard input: a line says that all of vLLM's processes are there, its end that they may go.
"""

import select
import subprocess
import sys

import psutil

from ...cluster.processes import end, running

LOOK_SECONDS = 0.5


def start() -> subprocess.Popen[str]:
    """Start a reaper of what this process begins from now on, in a session of its own."""
    command = [sys.executable, "-m", __spec__.name, str(psutil.Process().pid)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def arm(reaper: subprocess.Popen[str]) -> None:
    """Say that vLLM's processes are all there; what this process begins later is not looked at."""
    assert reaper.stdin
    reaper.stdin.write("\n")
    reaper.stdin.flush()


def dismiss(reaper: subprocess.Popen[str]) -> None:
    """Have it end what is left, and go."""
    assert reaper.stdin
    reaper.stdin.close()
    reaper.wait(timeout=60)


def main(parent: int) -> None:
    """Note what descends from `parent` until it says that this is all; end it once `parent` is gone."""
    here = psutil.Process()
    before = _below(parent)
    found: set[psutil.Process] = set()
    told = False
    while not told:
        told = bool(select.select([sys.stdin], [], [], LOOK_SECONDS)[0])
        found |= _below(parent)
    sys.stdin.read()
    end(lambda: [process for process in found - before - {here} if running(process)])


def _below(parent: int) -> set[psutil.Process]:
    """What descends from a process, but for Python's tracker of shared memory, which ends with it by itself."""
    try:
        return {p for p in psutil.Process(parent).children(recursive=True) if "resource_tracker" not in _command(p)}
    except psutil.NoSuchProcess:
        return set()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


if __name__ == "__main__":
    main(int(sys.argv[1]))
