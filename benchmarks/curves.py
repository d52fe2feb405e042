"""What several runs of two sides say of each other: rewards, times and phases, step by step. Pure.

A run is a list of steps: `seconds` from its launch to the step's end, `reward`, and `seconds/PHASE` within the step.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Run = Sequence[dict[str, float]]
_SMOOTH = 5


def comparison(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """Everything there is to say, of as many runs as there are of both."""
    if not ours or not theirs:
        return {}
    mine, others = ([smoothed([step["reward"] for step in run]) for run in side] for side in (ours, theirs))
    level = min(max(curve) for curve in others)
    sides = {"ours": ours, "theirs": theirs}
    parts = {name: phases(runs) for name, runs in sides.items()}
    return {
        "start_seconds": {
            name: _median([run[0]["seconds"] - _step(run) for run in runs]) for name, runs in sides.items()
        },
        "seconds_a_step": {name: _median([_step(run) for run in runs]) for name, runs in sides.items()},
        "phases": parts,
        "amdahl": amdahl(parts["ours"], parts["theirs"]),
        "inside": inside(mine, others),
        "reward_at_the_end": {"ours": _ends(mine), "theirs": _ends(others)},
        "seconds_to_reward": {
            "reward": round(level, 3),
            **{
                name: [seconds_to(run, curve, level) for run, curve in zip(runs, curves, strict=True)]
                for name, runs, curves in (("ours", ours, mine), ("theirs", theirs, others))
            },
        },
        "rewards": {name: [[round(s["reward"], 4) for s in run] for run in runs] for name, runs in sides.items()},
    }


def smoothed(rewards: Sequence[float]) -> list[float]:
    """The mean of each value and of up to four before it."""
    return [float(np.mean(rewards[max(0, i + 1 - _SMOOTH) : i + 1])) for i in range(len(rewards))]


def inside(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """The share of steps at which the mean of our curves lies within the least and the greatest of theirs, above the
    greatest, and below the least."""
    mean, others = np.mean(ours, axis=0), np.array(theirs)
    above, below = mean > others.max(axis=0), mean < others.min(axis=0)
    shares = {"inside": ~(above | below), "above": above, "below": below}
    return {name: round(float(share.mean()), 3) for name, share in shares.items()}


def seconds_to(run: Run, curve: Sequence[float], level: float) -> float | None:
    """From the end of the first step to that of the one whose smoothed reward reaches the level; none if none does."""
    return next(
        (
            round(step["seconds"] - run[0]["seconds"], 2)
            for step, reward in zip(run, curve, strict=True)
            if reward >= level
        ),
        None,
    )


def phases(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds a step in each phase, and in what is none, over all runs without their first steps."""
    names = sorted({name for run in runs for step in run for name in step if name.startswith("seconds/")})
    steps = [step for run in runs for step in run[1:]]
    took = {name.removeprefix("seconds/"): float(np.mean([s.get(name, 0.0) for s in steps])) for name in names}
    rest = float(np.mean([_step(run) for run in runs])) - sum(took.values())
    return {name: round(value, 4) for name, value in {**took, "rest": rest}.items()}


def amdahl(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """The ratio of both steps; and what it were if generation, the update, or everything else took no time."""
    whole, step = sum(theirs.values()), sum(ours.values())
    work = ours.get("generate", 0.0) + ours.get("update", 0.0)
    left = {
        "as_measured": step,
        "without_generate": step - ours.get("generate", 0.0),
        "without_update": step - ours.get("update", 0.0),
        "generate_and_update_alone": work,
    }
    return {name: round(whole / max(seconds, 1e-9), 2) for name, seconds in left.items()}


def _step(run: Run) -> float:
    return (run[-1]["seconds"] - run[0]["seconds"]) / max(len(run) - 1, 1)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _ends(curves: Sequence[Sequence[float]]) -> list[float]:
    return [round(curve[-1], 3) for curve in curves]
