"""How many rollout workers keep generation in step with the update (`workers: auto`). Pure."""

import math
from statistics import median

_STEPS = 3
"""Measured with one number of workers before it is changed: one step alone says little."""
_SLACK = 1.1
"""By how much generation may be off before it is changed, so that noise does not move workers about."""


class Balance:
    """Follows the ratio of generation to update time and says how many workers are wanted.

    A step's samples take so many seconds of workers together; its update, with reference, values and publication, takes
    others. As many workers as the one holds the other let neither wait for the other where they overlap
    (`staleness: 1`), and share the step's time in two equal parts where they do not. Results depend on it in nothing.
    """

    def __init__(self, least: int, most: int) -> None:
        """Bounds of what is wanted."""
        self._least, self._most = least, most
        self._ratios: list[float] = []
        self._workers = 0

    def step(self, workers: int, generating: float, learning: float) -> int:
        """Take in a step that `workers` generated in so many seconds of theirs together, and that was learned from in
        `learning` seconds; gives how many are wanted from now on."""
        if workers != self._workers:
            self._workers, self._ratios = workers, []
        self._ratios.append(generating / max(learning, 1e-9))
        if len(self._ratios) < _STEPS:
            return workers
        ratio = median(self._ratios[-_STEPS:])
        if ratio > workers * _SLACK or ratio * _SLACK < workers - 1:
            workers = math.ceil(ratio / _SLACK)
        return min(max(workers, self._least), self._most)
