"""Answers of remote calls in the order in which they arrive: one queue and one thread, for any number of actors.

Ray's `wait` looks at every open call each time; here an answer costs the same however many others are open.
"""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..cluster import calls
from ..cluster.errors import WorkerLost

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

    def get(self, ref: Any, *, actor: str, what: str, timeout: float, tick: Callable[[], None]) -> Any:
        """Wait for one answer, as `calls.get` does, and have whatever else arrives handled meanwhile.

        `tick` is called whenever something has arrived, and at least every `LOOK_SECONDS`.
        """
        ended: list[Future[Any]] = []
        self.expect(ref, ended.append)
        give_up = time.monotonic() + timeout
        self.take(0)
        while not ended:
            left = give_up - time.monotonic()
            if left <= 0:
                raise WorkerLost(f"{actor} did not finish {what} within {timeout:.0f} s")
            tick()
            self.take(min(left, LOOK_SECONDS))
        return calls.outcome(ended[0], actor=actor, what=what)
