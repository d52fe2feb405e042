"""Answers of remote calls in the order in which they arrive: one queue and one thread, for any number of actors.

Ray's `wait` looks at every open call each time; here an answer costs the same however many others are open.
"""

import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..cluster import calls
from ..cluster.errors import RunFailed, WorkerLost

Handler = Callable[["Future[Any]"], None]
"""Given the ended call; `calls.outcome` makes a result or an error of it. It must not raise."""

LOOK_SECONDS = 0.2
"""How often somebody who waits for an answer looks at the clock."""


class Inbox:
    """`expect` says who handles a call's answer; `take` runs the handlers on the caller's thread."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[tuple[Handler, Future[Any]]] = queue.SimpleQueue()

    def expect(self, ref: Any, handler: Handler) -> None:
        """Have the answer of a call, or the death of its actor, handled."""
        ref.future().add_done_callback(lambda future: self._ended.put((handler, future)))

    def take(self, timeout: float) -> None:
        """Handle what has arrived, after waiting at most `timeout` seconds for the first."""
        try:
            handler, future = self._ended.get(timeout > 0, timeout or None)
            while True:
                handler(future)
                handler, future = self._ended.get_nowait()
        except queue.Empty:
            return

    def get_together(
        self, refs: Mapping[str, Any], *, what: str, timeout: float, tick: Callable[[], None]
    ) -> list[Any]:
        """Wait for calls on actors that work together, by their names, and have what else arrives handled meanwhile.

        The first that fails ends the wait: the others may be waiting for it. Where an actor died, that is raised rather
        than what it made of its peers. Raises as `calls.get` does. `tick` is called whenever something has arrived, and
        at least every `LOOK_SECONDS`.
        """
        ended: dict[str, Future[Any]] = {}
        for name, ref in refs.items():
            self.expect(ref, partial(ended.__setitem__, name))
        give_up = time.monotonic() + timeout
        self.take(0)
        try:
            while True:
                answers = {n: calls.outcome(future, actor=n, what=what) for n, future in ended.items()}
                if len(answers) == len(refs):
                    return [answers[name] for name in refs]
                if (left := give_up - time.monotonic()) <= 0:
                    late = ", ".join(name for name in refs if name not in ended)
                    raise WorkerLost(f"{late} did not finish {what} within {timeout:.0f} s")
                tick()
                self.take(min(left, LOOK_SECONDS))
        except WorkerLost:
            raise
        except RunFailed as error:
            if len(refs) > 1 and (death := calls.death(refs, what)):
                raise death from error
            raise
