"""The processes of one Ray on this machine: found by a mark in their environment, ended without touching another Ray.

Ray's processes leave their session in many ways: agents outlive a killed raylet, titles are rewritten (which wipes the
environment that other processes can read), workers start sessions of their own. So a process belongs if it carries the
mark, or goes by one of Ray's titles and has a file of that Ray's folder open, or descends from one that does.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from .errors import RunFailed

MARK = "RAYLIGN_CLUSTER"
"""The environment variable that the processes of one Ray inherit."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

Started = tuple[int, float]
"""A process for good: its id and when it was started, since ids are used again."""


def started(process: psutil.Process) -> Started:
    """Names a process for good."""
    return process.pid, process.create_time()


def running(process: psutil.Process) -> bool:
    """Whether it runs; one that ended and waits for its parent to notice does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(mark: str, folder: Path, known: Iterable[Started] = ()) -> list[psutil.Process]:
    """The running processes of the Ray with that mark and session folder, and those `known` that still run."""
    remembered = set(known)
    seeds = [p for p in psutil.process_iter() if _belongs(p, mark, folder, remembered)]
    found = {*seeds, *(child for seed in seeds for child in _children(seed))}
    own = psutil.Process()
    return [p for p in found - {own, *own.parents()} if running(p)]


def end(find: Callable[[], list[psutil.Process]], *, grace: float = 3.0, deadline: float = 30.0) -> int:
    """End every process that `find` gives, asked first and killed after `grace` seconds; returns how many there were.

    Looks again until none is found, since they start others while they end. Raises `RunFailed` after `deadline`
    seconds.
    """
    give_up = time.monotonic() + deadline
    found = find()
    ended = set(found)
    _each(found, psutil.Process.terminate)
    _wait(found, grace)
    while found := find():
        if time.monotonic() > give_up:
            raise RunFailed(f"these processes do not end: {', '.join(str(p.pid) for p in found)}")
        ended.update(found)
        _each(found, psutil.Process.kill)
        _wait(found, 2.0)
    return len(ended)


def adopt_orphans() -> None:
    """Have processes that descend from this one become its children when their parents end, as far as Linux does."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """The running processes that descend from this one; those that have ended are buried, so their exit codes go."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [p for p in psutil.Process().children(recursive=True) if running(p)]


def end_with(parent: int) -> None:
    """Have this process get SIGTERM when its parent ends, or at once where it has ended already; on Linux."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _belongs(process: psutil.Process, mark: str, folder: Path, known: set[Started]) -> bool:
    try:
        if process.uids().real != os.getuid():
            return False
        if process.environ().get(MARK) == mark or started(process) in known:
            return True
        title = (process.cmdline() or [""])[0]
        return title.startswith("ray") and any(folder in Path(f.path).parents for f in process.open_files())
    except psutil.Error:
        return False  # it ended while we looked, or is none of ours


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _each(processes: list[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        try:
            act(process)
        except psutil.NoSuchProcess:
            continue


def _wait(processes: list[psutil.Process], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(running(p) for p in processes):
        time.sleep(0.05)
