"""The rows an update is made of, and how they are cut into micro-batches.

Shapes: P prompt tokens, T completion tokens, B rows of a micro-batch, L its longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..stages import OnlineStage


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
    written: np.ndarray | None = None
    """Which tokens the policy drew, where there are observations between them: these alone are learned."""
    rejected: "TrainSample | None" = None
    """In a pair: the completion of the same prompt that this one is preferred to."""

    @property
    def length(self) -> int:
        """P + T."""
        return len(self.prompt) + len(self.tokens)

    @property
    def learned(self) -> np.ndarray:
        """Which tokens `[T]` count."""
        return np.ones(len(self.tokens), bool) if self.written is None else self.written

    @property
    def count(self) -> int:
        """How many tokens count."""
        return len(self.tokens) if self.written is None else int(self.written.sum())

    @property
    def rows(self) -> tuple["TrainSample", ...]:
        """What a forward takes of it: itself, and in a pair the rejected one beside it."""
        return (self,) if self.rejected is None else (replace(self, rejected=None), self.rejected)

    @property
    def pushes(self) -> bool:
        """Whether the policy's objective moves anything by it: a pair does, and what has an advantage."""
        return self.rejected is not None or bool(self.advantages.any())


def trained(samples: Sequence[TrainSample], stage: OnlineStage) -> list[TrainSample]:
    """Those of an update's samples that the policy's loss depends on; to compute the others changes no gradient.

    Without advantages a sample counts in what the loss is divided by and nowhere else, unless the loss has a KL or an
    entropy bonus, which it does move.
    """
    everyone = stage.entropy_bonus > 0 or (stage.kl is not None and stage.kl.place == "loss")
    return [s for s in samples if everyone or s.pushes]


class MicroBatch(NamedTuple):
    """Rows of one forward; with `counts` off, it is there for the other ranks' sake, and its rows count for nothing."""

    rows: list[int]
    counts: bool = True


def rank_batches(
    lengths: Sequence[int], max_tokens: int, ranks: int, kinds: Sequence[Any] | None = None
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, as many for each: sharded weights are gathered by all ranks together.

    Rows go to the rank that has the fewest tokens, the longest first; those of unlike kinds never meet. A rank that has
    fewer micro-batches than others computes the shortest row, which counts for nothing.
    """
    kinds = kinds or [0] * len(lengths)
    cut: list[list[MicroBatch]] = []
    for share in _shares(lengths, ranks):
        cut.append([])
        for kind in sorted({kinds[i] for i in share}):
            alike = [i for i in share if kinds[i] == kind]
            batches = micro_batches([lengths[i] for i in alike], max_tokens)
            cut[-1] += [MicroBatch([alike[i] for i in rows]) for rows in batches]
    most = max(map(len, cut))
    idle = MicroBatch([min(range(len(lengths)), key=lengths.__getitem__)], counts=False) if lengths else None
    return [batches + [idle] * (most - len(batches)) for batches in cut if idle]


def _shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows of each rank, in their order."""
    tokens = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = tokens.index(min(tokens))
        tokens[rank] += lengths[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


_BATCH_COSTS = 64
"""A micro-batch takes as long as so many tokens, beside those in it; from 16 to 128 were as fast on a CPU, 256 not."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into batches of at most `max_tokens` padded tokens, rows of like length together, at the least cost:
    that of all padded tokens and of the batches themselves.

    Longest first, so that memory runs out in the first micro-batch or never. A row longer than `max_tokens` is a batch
    of its own. Which rows meet depends on the lengths alone, so it is the same in every run.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest = np.array([lengths[i] for i in order], np.int64)
    least, starts = np.zeros(len(order) + 1, np.int64), np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):  # the best cut of the first `end` rows, by where its last batch starts
        padded = longest[:end] * np.arange(end, 0, -1)
        fits = padded <= max_tokens
        fits[-1] = True
        costs = np.where(fits, least[:end] + padded + _BATCH_COSTS, np.iinfo(np.int64).max)
        starts[end] = costs.argmin()
        least[end] = costs[starts[end]]
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def pad(rows: Sequence[np.ndarray], length: int, fill: float = 0) -> np.ndarray:
    """Rows of unlike length as one array `[B, length]`, filled on the right."""
    out = np.full((len(rows), length), fill, rows[0].dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
