"""The supervisor of a run: a thin process that starts the run's controller again when it was killed.

It forks before anything heavy is imported: the child goes on as the controller, so that supervision costs no second
start, and the parent waits. What the dead controller had started becomes the parent's (Linux hands orphans to it) and
is ended before the next one begins; nothing else on the machine is looked at.
"""

import contextlib
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from .config import ControllerConfig
from .processes import adopt_orphans, descendants, end, end_with
from .rundir import AT_WORK, RunDir

_LOOK_SECONDS = 0.1
_LONGEST_PAUSE = 60.0
_REFUSALS = (2, 3, 4, 5)
"""Exit codes that another attempt would give again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A controller and those before it; without a supervisor it is the first and the last."""

    again: bool = False
    """Whether it takes the place of one that died."""
    run: RunDir | None = None
    """The run, where a supervisor waits for the controller's end."""
    seen: frozenset[str] = frozenset()
    """The run's progress when it was started."""
    word: mmap.mmap | None = None
    """A byte that it shares with the supervisor: not 0 once the run has ended, though its directory does not say so."""

    def end(self) -> None:
        """Tell the supervisor that the run ends with this controller, where that cannot be written down."""
        if self.word:
            self.word[0] = 1

    def may_die(self) -> bool:
        """Whether it may end on an exception that nobody foresaw as if it had been killed, to be begun again.

        A defect would come back for ever: a controller that was begun again may not, unless there is a new checkpoint.
        """
        if self.run is None or self.run.desired().get("stop"):
            return False
        return not self.again or bool(progress(self.run) - self.seen)


def progress(run: RunDir) -> set[str]:
    """What a run has to show: its checkpoints and finished stages."""
    kept = {str(path) for path in run.path.glob("checkpoints/*/step-*")}
    finished = run / "progress.json"
    return kept | ({finished.read_text()} if finished.exists() else set())


def supervised(run: RunDir, config: ControllerConfig, say: Callable[[str], None]) -> Attempt:
    """Return in a child process, which is the run's controller.

    The parent stays in here, passes SIGINT and SIGTERM on, and exits with the controller's code. Hold the run around
    this: then it is held between two controllers too. Without restarts to give there is no supervisor, and this process
    is the controller.
    """
    if not config.max_restarts:
        return Attempt()
    return _Supervisor(run, config, say).watch()


class _Supervisor:
    def __init__(self, run: RunDir, config: ControllerConfig, say: Callable[[str], None]) -> None:
        self._run, self._config, self._say = run, config, say
        self._child = self._ended = 0
        self._word = mmap.mmap(-1, 1)
        self._asked: int | None = None
        """The signal by which this process was asked to end."""

    def watch(self) -> Attempt:
        """Keep a controller until it ends by itself; returns in each of them."""
        adopt_orphans()
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        seen, failures, again = progress(self._run), 0, False
        while self._start(before):
            code = self._wait()
            if not self._died(code):
                raise SystemExit(code if code >= 0 else 128 - code)
            end(descendants)
            made = progress(self._run)
            failures = 1 if made - seen else failures + 1
            seen, again = seen | made, True
            self._heal(code, failures)
        return Attempt(again, self._run, frozenset(seen), self._word)

    def _start(self, handlers: dict[signal.Signals, Any]) -> bool:
        """Fork a controller, which takes signals as this process did before; false in it."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent, child = os.getpid(), os.fork()
        if not child:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            end_with(parent)  # where the supervisor is killed, the run stops
            return False
        self._child = child
        if self._asked:
            os.kill(child, self._asked)
        return True

    def _pass_on(self, number: int, _frame: object) -> None:
        self._asked = number
        if self._child:
            with contextlib.suppress(ProcessLookupError):  # it ends by itself at this moment
                os.kill(self._child, number)

    def _wait(self) -> int:
        """The controller's exit code, minus the signal that ended it; one that is suspended for long is killed."""
        child, suspended = psutil.Process(self._child), 0.0
        while True:
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                self._child, self._ended = 0, ended
                return os.waitstatus_to_exitcode(status)
            # added up, not read from a clock: a terminal's Ctrl-Z suspends this process too
            suspended = suspended + _LOOK_SECONDS if child.status() == psutil.STATUS_STOPPED else 0.0
            if suspended > self._config.hang_seconds:
                child.kill()
            time.sleep(_LOOK_SECONDS)

    def _died(self, code: int) -> bool:
        """Whether a controller ended by no will of its own or of the user."""
        if self._word[0]:
            return False
        state = self._run.status()
        unsaid = state.get("status") in AT_WORK and state.get("pid") == self._ended
        return self._asked is None and (code < 0 or (code not in _REFUSALS and unsaid))

    def _heal(self, code: int, failures: int) -> None:
        """Note a death and wait before the next start. Raises `SystemExit` where there have been too many."""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} before the run did"
        if failures > self._config.max_restarts:
            way_on = f"`raylign resume {self._run.argument}` goes on"
            self._say(f"the controller {how}, {failures} times now without a new checkpoint: {way_on}")
            raise SystemExit(1)
        pause = min(self._config.pause_seconds * 2 ** (failures - 1), _LONGEST_PAUSE)
        self._say(f"the controller {how}: starting it again in {pause:g} s ({failures} of {self._config.max_restarts})")
        with contextlib.suppress(OSError):  # a full disk does not keep the run from going on
            total = self._run.status().get("controller_restarts", 0) + 1
            self._run.update_status(controller_restarts=total)
            self._run.event("controller_lost", reason=f"it {how}")
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if self._asked:
                raise SystemExit(128 + self._asked)
            time.sleep(_LOOK_SECONDS)
