"""Rows in which what samples begin with alike is computed once: the prompt of a group, a system prompt, a first word.

A row holds the tokens of several samples as a flat trie: each token stands after those before it in its samples, and
sees these and no others. A model that takes positions and a mask gives such a row what it gives the samples alone, and
the gradients of both are equal (as of packed rows of shared prefixes in training, 2506.05433).

Shapes: L tokens of a row, S tokens of a sample but its last, from which nothing is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .batch import TrainSample

_LONGEST = 8192
"""Tokens in a row that is shared, since its mask has their square."""

_LOOK_BACK = 512
"""Samples in a row at most, so that finding the cuts stays cheap."""


@dataclass(frozen=True, slots=True)
class Row:
    """Samples in one row of a forward.

    `paths` are the places `[S]` of each sample's tokens, in the order of the samples.
    """

    samples: tuple[TrainSample, ...]
    ids_L: np.ndarray
    depths_L: np.ndarray
    """What position each token has in its samples."""
    paths: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, samples: Sequence[TrainSample]) -> "Row":
        """One after the other, each from where it leaves the one before it."""
        ids, depths, paths, length = [], [], [], 0
        last, last_path = np.zeros(0, np.int32), np.zeros(0, np.int64)
        for sample in samples:
            tokens = inputs(sample)
            alike = common(last, tokens)
            path = np.concatenate([last_path[:alike], np.arange(length, length + len(tokens) - alike)])
            ids.append(tokens[alike:])
            depths.append(np.arange(alike, len(tokens)))
            length += len(tokens) - alike
            paths.append(path)
            last, last_path = tokens, path
        return cls(tuple(samples), np.concatenate(ids), np.concatenate(depths), tuple(paths))

    @property
    def length(self) -> int:
        """L."""
        return len(self.ids_L)

    @property
    def shared(self) -> bool:
        """Whether some token does not see all those before it."""
        return len(self.samples) > 1

    def predictors(self) -> list[np.ndarray]:
        """The places from which each sample's completion tokens are predicted, those that count."""
        own = zip(self.samples, self.paths, strict=True)
        return [path[len(s.prompt) - 1 :][: len(s.tokens)][s.learned] for s, path in own]

    def sees(self, length: int) -> np.ndarray:
        """Which token sees which, `[length, length]`; what pads the row sees itself."""
        sees_LL, done = np.eye(length, dtype=bool), 0
        for path in self.paths:
            new = path[path >= done]
            sees_LL[np.ix_(new, path[path < done])] = True
            sees_LL[done : done + len(new), done : done + len(new)] = np.tri(len(new), dtype=bool)
            done += len(new)
        return sees_LL


@dataclass(frozen=True, slots=True)
class Bundle:
    """Samples that are computed together, by their places in the list given: one row, or a row for each."""

    places: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def kind(self) -> tuple[int, bool]:
        """Only bundles of a kind are alike enough for one forward: as many rows each, all with a mask or none."""
        return len(self.rows), self.rows[0].shared

    @property
    def tokens(self) -> int:
        """Tokens of its rows, the shorter padded."""
        return len(self.rows) * max(row.length for row in self.rows)


@dataclass(frozen=True, slots=True)
class Packing:
    """How samples come into rows of at most `max_tokens`, but for those that are longer alone.

    They share a row where the tokens saved are worth more than what attention looks at in vain: `pair_cost` is what a
    pair of tokens costs there, in tokens; None where a model cannot share. Samples longer than `window`, which not all
    layers see as a whole, share nothing.
    """

    max_tokens: int
    pair_cost: float | None = None
    window: int | None = None

    def bundles(self, samples: Sequence[TrainSample], at_most: int = _LONGEST) -> list[Bundle]:
        """The samples at the least cost, each with what it is preferred to in a pair; `at_most` bounds a shared row.

        Which share a row depends on the samples alone, not on their order.
        """
        longest = min(at_most, self.max_tokens, _LONGEST)
        order = sorted(range(len(samples)), key=lambda i: (_key(samples[i]), i))
        ordered = [samples[i] for i in order]
        alone = [self._alone(sample, longest) for sample in ordered]
        bundles = [
            Bundle(tuple(order[a:b]), alone[a] if b == a + 1 else (_row(ordered[a:b]),))
            for a, b in self._cuts(ordered, alone, longest)
        ]
        return sorted(bundles, key=lambda bundle: bundle.places)

    def _alone(self, sample: TrainSample, longest: int) -> tuple[Row, ...]:
        """The rows of a sample that shares with no other."""
        apart = tuple(Row.of([row]) for row in sample.rows)
        together = (_row([sample]),)
        shares = self._shares(sample) and together[0].length <= longest
        return together if shares and self._cost(together) < self._cost(apart) else apart

    def _shares(self, sample: TrainSample) -> bool:
        whole = self.window is None or all(row.length <= self.window for row in sample.rows)
        return self.pair_cost is not None and whole

    def _cost(self, rows: Sequence[Row]) -> float:
        """Of a row alone, in tokens: what one sample looks at is causal, half of the pairs."""
        pair = self.pair_cost or 0.0
        return sum(row.length + row.length**2 * (pair if row.shared else pair / 2) for row in rows)

    def _cuts(
        self, samples: Sequence[TrainSample], alone: Sequence[tuple[Row, ...]], longest: int
    ) -> list[tuple[int, int]]:
        """Where to cut sorted samples into rows; the best cut of the first n from the best cuts of fewer."""
        lengths = np.array([_row([s]).length for s in samples], np.int64)
        two = [_row([a, b]).length for a, b in pairwise(samples)]
        grown = np.cumsum([0, *(two - lengths[:-1])])
        share = np.array([self._shares(s) for s in samples], bool)
        least, starts = np.zeros(len(samples) + 1), np.zeros(len(samples) + 1, np.int64)
        for end in range(1, len(samples) + 1):
            first = max(0, end - _LOOK_BACK)
            tokens = lengths[first:end] + grown[end - 1] - grown[first:end]
            fits = (tokens <= longest) & np.logical_and.accumulate(share[first:end][::-1])[::-1]
            costs = np.where(fits, tokens + tokens**2 * (self.pair_cost or 0.0), np.inf)
            costs[-1] = self._cost(alone[end - 1])
            costs += least[first:end]
            starts[end] = first + costs.argmin()
            least[end] = costs.min()
        cuts = [len(samples)]
        while cuts[-1]:
            cuts.append(int(starts[cuts[-1]]))
        return list(pairwise(cuts[::-1]))


def inputs(sample: TrainSample) -> np.ndarray:
    """What a forward takes of a sample, `[S]`."""
    return np.concatenate([sample.prompt, sample.tokens])[:-1]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """With how many tokens both begin."""
    size = min(len(a), len(b))
    other = a[:size] != b[:size]
    return int(other.argmax()) if other.any() else size


def _row(samples: Sequence[TrainSample]) -> Row:
    return Row.of([row for sample in samples for row in sample.rows])


def _key(sample: TrainSample) -> bytes:
    """Sorts as the tokens of its sequence do."""
    return inputs(sample).astype(">u4").tobytes()
