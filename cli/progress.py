"""Progress of a run on stderr: a bar on a terminal, a line now and then elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..cluster.rundir import RunDir
from .output import notes

_LINE_EVERY_SECONDS = 15.0


@contextmanager
def progress_of(run: RunDir) -> Iterator[None]:
    """Show where a run is for as long as the block lasts."""
    done = threading.Event()
    show = _bar if notes.is_terminal else _lines
    thread = threading.Thread(target=show, args=(run, done), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _bar(run: RunDir, done: threading.Event) -> None:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=notes, transient=True) as bars:
        tasks: dict[str, Any] = {}
        while not done.wait(0.5):
            status = run.status()
            stage = status.get("stage")
            if not stage or not status.get("steps"):
                continue
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=status["steps"], facts="")
            bars.update(tasks[stage], completed=status.get("step", 0), total=status["steps"], facts=_facts(status))


def _lines(run: RunDir, done: threading.Event) -> None:
    last, said = (None, None), time.monotonic()
    while not done.wait(1.0):
        status = run.status()
        place = (status.get("stage"), status.get("step"))
        if not status.get("steps") or place == last or time.monotonic() - said < _LINE_EVERY_SECONDS:
            continue
        last, said = place, time.monotonic()
        notes.print(f"  {place[0]} {place[1]}/{status['steps']}  {_facts(status)}", highlight=False)


def _facts(status: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in list(status.get("metrics", {}).items())[:4])
