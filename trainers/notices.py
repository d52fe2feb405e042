"""What a run stops for without being asked: its deadline, and nodes that are going away under its roles."""

import time
from collections.abc import Callable

from ..cluster.draining import going_away
from ..cluster.rundir import RunDir

_LOOK_SECONDS = 2.0
_REPLACED = ("rollout-", "reward-")
"""Actors that others take the place of while the run goes on."""


class Notices:
    """Call it often: it gives why the run must stop, or an empty text; `nodes` tells which actors' nodes drain."""

    def __init__(self, deadline: float | None = None, nodes: Callable[[], dict[str, str]] = going_away) -> None:
        self.deadline, self._nodes = deadline, nodes
        self._looked = 0.0

    def __call__(self) -> str:
        if self.deadline is not None and time.time() >= self.deadline:
            return "its time is over (max_hours)"
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return ""
        self._looked = time.monotonic()
        return preempted(self._nodes())


def preempted(draining: dict[str, str]) -> str:
    """Why a run must stop whose actors, by name, are on these draining nodes; rollout workers and scorers may go."""
    held = {actor: node for actor, node in draining.items() if not actor.rsplit("/", 1)[-1].startswith(_REPLACED)}
    if not held:
        return ""
    actor, node = min(held.items())
    return f"node {node} is going away, and {actor} is there"


def deadline_of(run: RunDir, max_hours: float | None, *, again: bool) -> float | None:
    """When this start's time is over, in seconds since the epoch; a controller begun `again` has its predecessor's."""
    kept = run.status().get("deadline")
    if again and kept:
        return kept
    deadline = time.time() + max_hours * 3600 if max_hours else None
    run.update_status(deadline=deadline)
    return deadline
