"""Pure functions of the step: the learning rate and which prompts a step draws. So a resume needs no state for them."""

import math
from functools import lru_cache

import numpy as np

from .stages import StageBase


def learning_rate(stage: StageBase, step: int, steps: int) -> float:
    """The rate of a step (from 0): linear warm-up (3 % of the steps by default), then the stage's schedule to zero."""
    warmup = stage.warmup_steps if stage.warmup_steps is not None else math.ceil(0.03 * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[stage.schedule]
    return stage.learning_rate * factor


def rows_drawn(seed: int, rows: int, first: int, count: int) -> list[int]:
    """Numbers of the rows drawn from the `first` draw on: each pass over the data is a permutation of its own.

    Passes follow each other without a gap, so every row is used once before any is used twice.
    """
    chosen = []
    for position in range(first, first + count):
        epoch, place = divmod(position, rows)
        chosen.append(int(_permutation(seed, rows, epoch)[place]))
    return chosen


@lru_cache(maxsize=2)
def _permutation(seed: int, rows: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
