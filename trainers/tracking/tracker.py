"""What takes a run's metrics."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes a step's metrics; one thread at a time calls it."""

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Note a step's metrics; with a stage they are called `<stage>/<metric>` and drawn over `<stage>/step`."""
        ...

    def finish(self) -> None:
        """Write everything out and let go of every process; may be called twice."""
        ...


class Trackers:
    """Several, each told everything; none of them keeps nothing."""

    def __init__(self, *trackers: Tracker) -> None:
        self.all = trackers

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Have all of them note a step's metrics."""
        for tracker in self.all:
            tracker.log(step, metrics, stage)

    def finish(self) -> None:
        """Finish all of them."""
        for tracker in self.all:
            tracker.finish()
