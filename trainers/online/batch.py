"""The rows an update is made of, and how they are cut into micro-batches.

Shapes: P prompt tokens, T completion tokens, B rows of a micro-batch, L its longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One completion with what the loss needs of it: tokens int32, the rest `[T]` float32.

    `behaviour` is NaN where no engine drew the tokens: an answer of the data.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    behaviour: np.ndarray
    advantages: np.ndarray
    reference: np.ndarray | None = None
    old: np.ndarray | None = None
    """The policy's log-probs before the step's first update, where there are several."""
    values: np.ndarray | None = None
    """The critic's, before the step's first update; and what it is to learn."""
    returns: np.ndarray | None = None
    rejected: "TrainSample | None" = None
    """In a pair: the completion of the same prompt that this one is preferred to."""

    @property
    def length(self) -> int:
        """P + T."""
        return len(self.prompt) + len(self.tokens)

    @property
    def rows(self) -> tuple["TrainSample", ...]:
        """What a forward takes of it: itself, and in a pair the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into batches of at most `max_tokens` padded tokens, rows of like length together.

    Longest first, so that memory runs out in the first micro-batch or never. A row longer than `max_tokens` is a batch
    of its own. Which rows meet depends on the lengths alone, so it is the same in every run.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(rows: Sequence[np.ndarray], length: int, fill: float = 0) -> np.ndarray:
    """Rows of unlike length as one array `[B, length]`, filled on the right."""
    out = np.full((len(rows), length), fill, rows[0].dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
