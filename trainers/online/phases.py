"""The phases of a step: how long each took, which is under way, and who worked in it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...cluster.calls import Wait
from ...cluster.rundir import RunDir


class Phases:
    """Times phases, and notes each that ends well as a span of the lane that works in it; `say` is told of a begin."""

    def __init__(self, run: RunDir, say: Callable[[], None]) -> None:
        self._run, self._say = run, say
        self.seconds: dict[str, float] = {}
        """Of the step under way, and of a checkpoint before it."""
        self.now: Wait | None = None
        """The one under way."""

    @contextmanager
    def __call__(self, name: str, step: int, lane: str | None = None, *, since: float | None = None) -> Iterator[None]:
        """A phase of a step; `since` is when its actors began, where that was before the loop came to wait for them."""
        start = time.time()
        self.now = Wait(f"{name} of step {step}", lane or "controller", "", since or start)
        self._say()
        try:
            yield
        finally:
            self.now = None
        end = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        if lane:
            self._run.span(lane, name, start, end, step=step)
