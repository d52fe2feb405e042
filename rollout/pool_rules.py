"""What the pool decides, as plain functions: who gets which group, who comes, who goes, when to give up.

Imports neither ray nor the pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from statistics import fmean, median
from typing import NamedTuple

from ..cluster.weights import WeightVersion
from .ledger import Ledger
from .records import Group

MAX_FAILURES = 4
"""How often a group may raise an error, or workers in a row fail to start, before the run fails."""

MAX_LOSSES = 20
"""How often a group may lose its worker: more, since it can be the neighbours' doing, but a group whose prompt kills
every worker must end."""

COPIES = 2
"""How many answering workers may run one group at a time."""

_LONGEST_PAUSE = 60.0
_SLOW = 2.0
"""A group is slow when it takes this many times what the step's other groups took,"""
_SLOW_SECONDS = 0.5
"""and at least this long: shorter ones are not worth a copy."""


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


def longest_first(groups: Sequence[Group], yielded: Mapping[int, int]) -> list[int]:
    """The groups' indices, the longest expected first, so that no long one is left for the end of a step.

    A group is as long as its longest completion. Expected is what the same prompt gave the last time (`yielded`, by
    `prompt_key`), for a new prompt the mean of those known; among equals the longer prompt, then the lower index.
    """
    usual = fmean(yielded.values()) if yielded else 0.0

    def order(group: Group) -> tuple[float, int, int]:
        return -yielded.get(prompt_key(group), usual), -len(group.prompt), group.index

    return [group.index for group in sorted(groups, key=order)]


def prompt_key(group: Group) -> int:
    """What a prompt is remembered by, within one process."""
    return hash(group.prompt.tobytes())


def assign(
    pending: Sequence[int], load: Mapping[str, int], capacity: int, barred: Mapping[int, Sequence[str]] | None = None
) -> list[tuple[int, str]]:
    """Each pending group, in order, to the worker with the fewest, as far as `capacity` groups a worker go.

    `barred` names the workers that a group must not go to; such a group is left out when there is no other.
    """
    room = [(count, place, worker) for place, (worker, count) in enumerate(load.items()) if count < capacity]
    heapify(room)
    given: list[tuple[int, str]] = []
    for index in pending:
        refused = []
        while room and room[0][2] in (barred or {}).get(index, ()):
            refused.append(heappop(room))
        if room:
            count, place, worker = heappop(room)
            given.append((index, worker))
            if count + 1 < capacity:
                heappush(room, (count + 1, place, worker))
        for entry in refused:
            heappush(room, entry)
    return given


class Holder(NamedTuple):
    """A worker as it stands to the weights: what it has or is about to prove, and how many groups it runs."""

    name: str
    weights: WeightVersion | None
    runs: int
    proving: bool
    silent: bool


def new_weights(
    needs: Sequence[tuple[WeightVersion, int]], holders: Sequence[Holder], capacity: int, newest: WeightVersion
) -> dict[str, WeightVersion]:
    """Which workers are to prove other weights now; never one that runs a group, or that proves some already.

    `needs` are the groups to be given out from each version, the oldest first: those for which its workers have no room
    get a worker each as far as there are any, since the update waits for the oldest. Who is not needed takes the
    newest.
    """
    free = {h.name: h for h in holders if not h.runs and not h.proving}
    told: dict[str, WeightVersion] = {}

    def take(holder: Holder, weights: WeightVersion) -> None:
        del free[holder.name]
        if not _same(holder.weights, weights):
            told[holder.name] = weights

    for weights, groups in needs:
        busy = [h for h in holders if h.name not in free and h.name not in told and _same(h.weights, weights)]
        missing = groups - sum(capacity - h.runs for h in busy)
        able = sorted((h for h in free.values() if not h.silent), key=lambda h: not _same(h.weights, weights))
        for holder in able[: max(0, missing)]:
            take(holder, weights)
    for holder in list(free.values()):
        take(holder, newest)
    return told


def _same(held: WeightVersion | None, weights: WeightVersion) -> bool:
    return held is not None and (held.version, held.digest) == (weights.version, weights.digest)


@dataclass(frozen=True, slots=True)
class Running:
    """A copy of a group: since how many seconds it runs, and whether its worker gives a sign of life."""

    index: int
    seconds: float
    answers: bool


def overdue(running: Sequence[Running], finished: Sequence[float]) -> list[int]:
    """Groups worth another copy, the slowest first; `finished` has the seconds of the step's other groups.

    Those that take long compared with the others, and those whose workers are all silent; never more than `COPIES` on
    workers that answer. Backup tasks as in MapReduce (Dean and Ghemawat 2004, section 3.6).
    """
    limit = max(_SLOW_SECONDS, _SLOW * median(finished)) if finished else float("inf")
    copies: dict[int, list[Running]] = {}
    for run in running:
        copies.setdefault(run.index, []).append(run)
    slow: list[tuple[float, int]] = []
    for index, runs in copies.items():
        answering = [r.seconds for r in runs if r.answers]
        if not answering or (len(answering) < COPIES and min(answering) > limit):
            slow.append((-max(r.seconds for r in runs), index))
    return [index for _, index in sorted(slow)]


def pause(failed_starts: int) -> float:
    """Seconds until the next start after so many in a row have failed: doubling, at most a minute."""
    return min(_LONGEST_PAUSE, 2.0 ** min(failed_starts, 6))


def give_up(ledger: Ledger, index: int, reason: str) -> str | None:
    """Why a group is not tried again, or None; `reason` is the last error that took a worker or a group."""
    where = f"{ledger.title}, group {index}"
    if ledger.failures[index] >= MAX_FAILURES:
        return f"{where}: failed on {MAX_FAILURES} workers, lastly: {reason}"
    if ledger.losses[index] >= MAX_LOSSES:
        return f"{where}: lost its worker {MAX_LOSSES} times, lastly: {reason}"
    return None
