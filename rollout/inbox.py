"""Answers of remote calls in the order in which they arrive: one queue and one thread, for any number of workers.

Ray's `wait` looks at every open call each time; here an answer costs the same however many others are open.
"""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Handler = Callable[["Future[Any]"], None]
"""Given the ended call; `calls.outcome` makes a result or an error of it. It must not raise."""


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
