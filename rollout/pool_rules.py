"""What the pool decides, as plain functions: who gets which group, who comes, who goes, when to give up.

Imports neither ray nor the pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ledger import Ledger

MAX_FAILURES = 4
"""How often a group may raise an error, or workers in a row fail to start, before the run fails."""

MAX_LOSSES = 20
"""How often a group may lose its worker: more, since it can be the neighbours' doing, but a group whose prompt kills
every worker must end."""

_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Moves:
    """What brings the pool to its target: how many workers to start, which joining ones to give up, which to drain."""

    start: int
    unwanted: tuple[str, ...]
    drain: tuple[str, ...]


def moves(target: int, ready: Sequence[str], coming: Sequence[str]) -> Moves:
    """The oldest stay: joining workers are given up before ready ones are drained, the newest first."""
    return Moves(
        start=max(0, target - len(ready) - len(coming)),
        unwanted=tuple(coming[max(0, target - len(ready)) :]),
        drain=tuple(ready[target:]),
    )


def assign(pending: Sequence[int], load: Mapping[str, int], capacity: int) -> list[tuple[int, str]]:
    """Each pending group, in order, to the worker with the fewest, as far as `capacity` groups a worker go."""
    load = dict(load)
    given: list[tuple[int, str]] = []
    for index in pending:
        worker = min((w for w in load if load[w] < capacity), key=lambda w: load[w], default=None)
        if worker is None:
            break
        load[worker] += 1
        given.append((index, worker))
    return given


def pause(failed_starts: int) -> float:
    """Seconds until the next start after so many in a row have failed: doubling, at most a minute."""
    return min(_LONGEST_PAUSE, 2.0 ** min(failed_starts, 6))


def give_up(ledger: Ledger, index: int, reason: str) -> str | None:
    """Why a group is not tried again, or None; `reason` is the last error that took a worker or a group."""
    where = f"step {ledger.step}, group {index}"
    if ledger.failures[index] >= MAX_FAILURES:
        return f"{where}: failed on {MAX_FAILURES} workers, lastly: {reason}"
    if ledger.losses[index] >= MAX_LOSSES:
        return f"{where}: lost its worker {MAX_LOSSES} times, lastly: {reason}"
    return None
