"""What is generated: prompts that no pair has seen before, and completion lengths that are fixed per request."""

import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Lengths = Literal["lognormal", "equal"]
_SEED = 20250
_SIGMA = 0.8
_RANGE = (1 / 8, 4)


def lognormal_lengths(count: int, median: int) -> np.ndarray:
    """Completion lengths `[count]` in tokens: lognormal with sigma 0.8, clipped to median/8 … 4 median, always the
    same for the same arguments."""
    drawn = np.random.default_rng(_SEED).lognormal(np.log(median), _SIGMA, count)
    low, high = (max(1, round(factor * median)) for factor in _RANGE)
    return np.clip(np.rint(drawn), low, high).astype(int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one case. EOS is off: request i wants `lengths[i]` tokens, useful tokens are their sum."""

    case: str
    """The case's name, so that no two cases have the same prompts."""
    vocabulary: int
    prompt: int
    """Tokens of a prompt."""
    lengths: tuple[int, ...]
    group: int = 1
    """So many requests in a row have one prompt, and one length."""

    @property
    def useful(self) -> int:
        """Completion tokens that are wanted."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and completion together."""
        return self.prompt + max(self.lengths)

    @property
    def prompts_computed(self) -> int:
        """Prompts that differ."""
        return len(self.lengths) // self.group

    def prompts(self, pair: int) -> list[list[int]]:
        """One prompt a request; new ones for every pair of every case, so that no prefix cache knows them;
        special ids are left out."""
        random = np.random.default_rng((_SEED, zlib.crc32(self.case.encode()), pair))
        drawn = random.integers(3, self.vocabulary, (self.prompts_computed, self.prompt))
        return drawn.repeat(self.group, axis=0).tolist()

    def warm_up(self) -> "Workload":
        """The same requests with a few tokens each."""
        return replace(self, lengths=tuple(min(length, 3) for length in self.lengths))

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {
            "requests": len(self.lengths),
            "prompt_tokens": self.prompt,
            "completion_tokens": {"sum": self.useful, "min": min(self.lengths), "max": max(self.lengths)},
            "group": self.group,
        }
