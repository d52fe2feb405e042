"""Interleaved pairs: ours, theirs, theirs, ours, … on one core and one thread, and the paired ratios' median."""

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .arena import Arena
from .measured import Case, Contest, Measured, Skipped


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides' repetition of one pair, and the machine's limit measured right before them."""

    ours: Measured
    theirs: Measured
    limit: float | None

    @property
    def ratio(self) -> float:
        """Our rate over theirs."""
        return self.ours.rate / self.theirs.rate

    @property
    def cpu_ratio(self) -> float:
        """The same by CPU seconds: other load on the machine does not count, nor do waits."""
        return self.ours.cpu_rate / self.theirs.cpu_rate


def one_core() -> None:
    """Bind this process and those it starts to one core, the same for both sides, and torch to one thread; no
    progress bars of transformers."""
    import torch
    from transformers.utils import logging

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@contextmanager
def all_cores() -> Iterator[None]:
    """Let this process, and those it starts meanwhile, have every core."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def run_pairs(contest: Contest, count: int, tell: Callable[[str], None]) -> list[Pair]:
    """Warm up, then measure `count` pairs, numbered from 1 (0 is the warm-up); who begins alternates."""
    contest.warm_up()
    pairs: list[Pair] = []
    for number in range(1, count + 1):
        limit = contest.limit() if contest.limit else None
        if number % 2:
            theirs = contest.theirs(number)
            ours = contest.ours(number)
        else:
            ours = contest.ours(number)
            theirs = contest.theirs(number)
        pairs.append(Pair(ours, theirs, limit))
        tell(f"{number}/{count} {ours.rate:,.0f} / {theirs.rate:,.0f} = {pairs[-1].ratio:.2f}")
    return pairs


def limit_fraction(pairs: Sequence[Pair], limit_ratio: float | None) -> float | None:
    """Ours over the limit: of the ratio where that is what is bounded, else of the rate, by CPU seconds, since the
    limit is measured in undisturbed moments."""
    if limit_ratio is not None:
        return statistics.median(pair.ratio for pair in pairs) / limit_ratio
    parts = [pair.ours.cpu_rate / pair.limit for pair in pairs if pair.limit]
    return statistics.median(parts) if parts else None


def summary(case: Case, contest: Contest, pairs: Sequence[Pair]) -> dict[str, Any]:
    """A case's entry in the result file: `ratio` is ours over theirs, above 1 is better."""
    ratios = [pair.ratio for pair in pairs]
    fraction = limit_fraction(pairs, contest.limit_ratio)
    return {
        "case": case.name,
        "peer": case.peer,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "pairs": len(pairs),
        "unit": case.unit,
        "ours": round(statistics.median(pair.ours.rate for pair in pairs), 3),
        "theirs": round(statistics.median(pair.theirs.rate for pair in pairs), 3),
        "ratio_cpu_median": round(statistics.median(pair.cpu_ratio for pair in pairs), 4),
        "limit_fraction": None if fraction is None else round(fraction, 4),
        "settings": contest.settings,
        "raw": [_raw(pair) for pair in pairs],
    }


def _raw(pair: Pair) -> dict[str, Any]:
    return {
        "ours_seconds": round(pair.ours.seconds, 6),
        "theirs_seconds": round(pair.theirs.seconds, 6),
        "ours_cpu_seconds": round(pair.ours.cpu_seconds, 6),
        "theirs_cpu_seconds": round(pair.theirs.cpu_seconds, 6),
        "ours_amount": pair.ours.amount,
        "theirs_amount": pair.theirs.amount,
        "limit": None if pair.limit is None else round(pair.limit, 3),
    }


def run_cases(
    cases: Iterable[Case], pairs: int, done: Callable[[dict[str, Any]], None], skipped: Callable[[str, str], None]
) -> None:
    """Measure cases one after the other; each finished one is handed to `done` at once, so that a stop keeps it."""
    for _, members in groupby(cases, key=lambda case: case.group):
        with Arena() as arena:
            for case in members:
                tell = _teller(case)
                try:
                    contest = case.make(arena)
                except Skipped as reason:
                    tell(f"skipped: {reason}")
                    skipped(case.name, str(reason))
                    continue
                done(summary(case, contest, run_pairs(contest, pairs, tell)))


def _teller(case: Case) -> Callable[[str], None]:
    return lambda text: print(f"{case.name}: {text}", file=sys.stderr, flush=True)
