"""Drawing tokens: counter-based random numbers, and inverse-CDF sampling of a batch of rows by one kernel on a CPU
(`sampling_kernel`) and by torch on other devices (`sampling_device`).

A token's random number depends on its seed key and its position alone, and a row's arithmetic on its own logits alone:
which rows are drawn together, where and when, changes no bit.

Shapes: n rows, V tokens of the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..records import SeedKey, TopLogprobs

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: SeedKey) -> int:
    """The 64-bit state of one sample's random stream; each field is mixed in before the next is added."""
    key = 0
    for field in seed:
        key = _mix((key + _GOLDEN + field) & _MASK)
    return key


def random_bits(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Output number `positions` of the SplitMix64 generators with states `keys`; uint64 `[n]` each.

    SplitMix64 (Steele, Lea, Flood 2014) counts its state up by a constant, so any output can be had without those
    before it.
    """
    value = keys + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) per row from its key and token position (uint64 `[n]`): float64 `[n]`, 53 bits."""
    return (random_bits(keys, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Knobs:
    """The rows' own sampling settings, `[n]` each: temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 keep
    everything; `top_logprobs` is how many of the likeliest tokens to report."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token per row, int64 `[n]`, its log-prob, float32 `[n]`, and for the rows that asked the likeliest tokens,
    `[n, k]` with the largest k that any row asked for."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top: TopLogprobs | None = None

    def tops(self, counts: np.ndarray) -> list[TopLogprobs | None]:
        """Each row's likeliest tokens, as many as it asked for."""
        if self.top is None:
            return [None] * len(self.tokens)
        ids, logprobs = self.top
        return [TopLogprobs(ids[i, :n], logprobs[i, :n]) if n else None for i, n in enumerate(counts.tolist())]


def draw(logits: "torch.Tensor", knobs: Knobs, uniform: np.ndarray, most: int = 0) -> Drawn:
    """Draw one token per row by the inverse CDF: the first token whose cumulative probability exceeds the uniform.

    `logits` `[n, V]` float32 stay as they are. They are divided by the temperature, then cut to tokens with min_p of
    the best one's probability, then to the top k, then to the smallest set that holds top_p of what is left (ties with
    its last token stay in). The order is vLLM's; transformers cuts by min_p last, which keeps more tokens where both
    min_p and top_p are set. Log-probs are of that distribution; greedy rows take the argmax and its log-softmax at
    T = 1. A row whose logits are not finite numbers gets the log-prob NaN. On a GPU, `most` is how many rows there ever
    are: always so many are drawn, since their number decides in which order torch adds up.
    """
    if logits.device.type != "cpu":
        from .sampling_device import draw_on_device

        return draw_on_device(logits, knobs, uniform, most)
    from .sampling_kernel import draw_rows

    rows, size = logits.shape
    ranks = min(int(knobs.top_logprobs.max(initial=0)), size)
    drawn = Drawn(np.empty(rows, np.int64), np.empty(rows, np.float32))
    top = TopLogprobs(np.empty((rows, ranks), np.int32), np.empty((rows, ranks), np.float32))
    draw_rows(
        logits.contiguous().numpy(),
        np.ascontiguousarray(knobs.temperature),
        np.ascontiguousarray(knobs.top_p),
        np.ascontiguousarray(knobs.top_k),
        np.ascontiguousarray(knobs.min_p),
        np.ascontiguousarray(knobs.top_logprobs),
        uniform,
        drawn.tokens,
        drawn.logprobs,
        top.ids,
        top.logprobs,
    )
    return replace(drawn, top=top) if ranks else drawn
