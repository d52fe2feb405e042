"""How a run is asked to end early: a flag in its directory, set by Ctrl-C, `raylign stop`, a job's SIGTERM, the run's
deadline, or the notice that its nodes are going away."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..cluster.rundir import RunDir


class StopRequested(Exception):
    """The run was asked to stop; work under way that is not checkpointed is made again, the same, on resume."""


def asked(run: RunDir) -> str:
    """Why the run was asked to stop, with the way on; for its summary."""
    return f"{run.desired().get('why') or 'asked to stop'}: `raylign resume {run.argument}` goes on"


def stop_if_asked(run: RunDir) -> None:
    """Raise `StopRequested` when the flag is set."""
    if run.desired().get("stop"):
        raise StopRequested


_ECHO_SECONDS = 0.3
"""A signal that follows another within so long is the same request: a terminal, and Ray where it stops a job, give it
to every process, and the supervisor passes on what it gets."""


class StopSignals:
    """SIGINT and SIGTERM of a process that works on a run: the first asks the run to stop, a second one ends it.

    `notice` is asked between steps, too, and gives why the run must stop, or an empty text. A handler interrupts the
    main thread anywhere, also where it has a lock, so it only counts; `follow`, called between the steps of the main
    thread's work, sets the flag and says so.
    """

    def __init__(self, run: RunDir, say: Callable[[str], None], notice: Callable[[], str] = lambda: "") -> None:
        self._run, self._say, self._notice = run, say, notice
        self._seen, self._seen_at = 0, 0.0
        self._followed = False

    @contextmanager
    def taken(self) -> Iterator["StopSignals"]:
        """Take the signals for as long as the block lasts; main thread only."""
        before = {number: signal.signal(number, self._count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, _number: int, _frame: object) -> None:
        before, self._seen_at = self._seen_at, time.monotonic()
        if self._seen_at - before < _ECHO_SECONDS:
            return
        self._seen += 1
        if self._seen > 1:
            raise KeyboardInterrupt

    def follow(self) -> None:
        """Ask the run to stop if a signal or a notice has come."""
        if self._followed:
            return
        if self._seen:
            self._followed = True
            self._run.desire(stop=True)
            self._say("stopping: checkpoint, drain, end (again to end at once)")
        elif why := self._notice():
            self._followed = True
            self._run.desire(stop=True, why=why)
            self._run.event("stop_noticed", reason=why)
            self._say(f"stopping: {why}: checkpoint, drain, end")

    def check(self) -> None:
        """Raise `StopRequested` if a signal or another command has asked the run to stop."""
        self.follow()
        stop_if_asked(self._run)
