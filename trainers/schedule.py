"""Pure functions of the step: learning rate, prompts drawn, samples of each update. So a resume needs no state."""

import math
from functools import lru_cache

import numpy as np

from .stages import StageBase


def learning_rate(stage: StageBase, step: int, steps: int, *, peak: float | None = None) -> float:
    """The rate of a step (from 0): linear warm-up (3 % of the steps by default), then the stage's schedule to zero.

    `peak` stands for the stage's own `learning_rate`, where what learns has one of its own.
    """
    peak = stage.learning_rate if peak is None else peak
    warmup = stage.warmup_steps if stage.warmup_steps is not None else math.ceil(0.03 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[stage.schedule]
    return peak * factor


def rows_drawn(seed: int, rows: int, first: int, count: int) -> list[int]:
    """Numbers of the rows drawn from the `first` draw on: each pass over the data is a permutation of its own.

    Passes follow each other without a gap, so every row is used once before any is used twice.
    """
    chosen = []
    for position in range(first, first + count):
        epoch, place = divmod(position, rows)
        chosen.append(int(_permutation(seed, rows, epoch)[place]))
    return chosen


def update_rows(seed: int, step: int, count: int, epochs: int, minibatches: int) -> list[list[int]]:
    """Which of a step's samples each of its updates trains on, in their order: every epoch cuts them anew.

    Minibatches differ by one sample at most; fewer samples than minibatches make as many updates as samples.
    """
    rows: list[list[int]] = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 1, epoch])).permutation(count)
        rows += [sorted(part.tolist()) for part in np.array_split(order, minibatches) if len(part)]
    return rows


@lru_cache(maxsize=2)
def _permutation(seed: int, rows: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
