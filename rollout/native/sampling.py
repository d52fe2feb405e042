"""Drawing tokens: counter-based random numbers, and inverse-CDF sampling of a batch of rows.

A token's random number depends on its seed key and its position alone, and a row's arithmetic on its own logits alone:
which rows are drawn together, where and when, changes no bit.

Shapes: n rows, V tokens of the vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..records import MAX_TOP_LOGPROBS, SeedKey, TopLogprobs

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_BLOCK = 256
_ONE_LEVEL = 1024
"""Vocabularies up to this size are searched with one cumulative sum, larger ones first by blocks."""
_FIRST_GUESS = 1024
"""Top-p sorts this many of the best tokens first, and more of them only where these do not hold the mass."""


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


def draw(logits: "torch.Tensor", knobs: Knobs, uniform: np.ndarray) -> Drawn:
    """Draw one token per row by the inverse CDF: the first token whose cumulative probability exceeds the uniform.

    `logits` `[n, V]` float32 stay as they are. They are divided by the temperature, then cut to tokens with min_p of
    the best one's probability, then to the top k, then to the smallest set that holds top_p of what is left (ties with
    its last token stay in). The order is vLLM's; transformers cuts by min_p last, which keeps more tokens where both
    min_p and top_p are set. Log-probs are of that distribution; greedy rows take the argmax and its log-softmax at
    T = 1. A row whose logits are not finite numbers gets the log-prob NaN.
    """
    import torch

    greedy = knobs.temperature == 0
    scores = _padded(logits)
    if not np.all(greedy | (knobs.temperature == 1)):
        temperature = np.where(greedy, 1.0, knobs.temperature).astype(np.float32)
        scores /= torch.from_numpy(temperature).to(scores.device)[:, None]
    _restrict(scores, knobs, greedy)
    top, best = scores.max(dim=-1)
    weights = (scores - top[:, None]).exp_()
    chosen, total = _invert(weights, torch.from_numpy(uniform).to(scores.device))
    tokens = torch.where(torch.from_numpy(greedy).to(scores.device), best, chosen)
    difference = scores.gather(1, tokens[:, None])[:, 0].double() - top.double()
    # Not a vector log: its last elements may be computed another way than the first.
    logs = np.array([np.log(value) if value > 0 else np.nan for value in total.tolist()])
    logprobs = (difference.cpu().numpy() - logs).astype(np.float32)
    return Drawn(tokens.cpu().numpy(), logprobs, _top(scores, top, logs, knobs.top_logprobs))


def _top(scores: "torch.Tensor", best: "torch.Tensor", logs: np.ndarray, counts: np.ndarray) -> TopLogprobs | None:
    """The likeliest tokens of the rows that ask for them; the others' places stay unset."""
    rows, most = np.flatnonzero(counts), int(counts.max())
    if not most:
        return None
    # Always the same number: how many a neighbour asks for must not decide which of two equals is left out.
    values, order = scores[rows].topk(min(MAX_TOP_LOGPROBS, scores.shape[1]), dim=1)
    order, by_id = order.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    most = min(most, values.shape[1])
    ids = np.zeros((len(counts), most), np.int32)
    logprobs = np.full((len(counts), most), -np.inf, np.float32)
    ids[rows] = order.gather(1, by_value)[:, :most].cpu().numpy()
    difference = (values.double() - best[rows, None].double())[:, :most].cpu().numpy()
    logprobs[rows] = difference - logs[rows, None]
    return TopLogprobs(ids, logprobs)


def _padded(logits: "torch.Tensor") -> "torch.Tensor":
    """A copy whose rows are a whole number of vectors long, so that no row's end falls into scalar code."""
    rows, size = logits.shape
    unit = 32 if size <= _ONE_LEVEL else _BLOCK
    scores = logits.new_full((rows, -(-size // unit) * unit), float("-inf"))
    scores[:, :size] = logits
    return scores


def _invert(weights: "torch.Tensor", uniform: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Index of the first weight whose running sum exceeds `uniform` of the total, and the total, float64 `[n]`."""
    import torch

    if weights.shape[1] <= _ONE_LEVEL:
        sums = weights.cumsum(dim=1, dtype=torch.float64)
        total = sums[:, -1]
        return _first_above(sums, uniform * total), total
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    sums = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    total = sums[:, -1]
    target = uniform * total
    block = _first_above(sums, target)
    rows = torch.arange(len(block), device=block.device)
    before = torch.where(block > 0, sums[rows, block - 1], 0.0)
    inside = blocks[rows, block].cumsum(dim=1, dtype=torch.float64)
    # The two sums may round differently: never look past the block's last token that has any probability.
    target = torch.minimum(target - before, torch.nextafter(inside[:, -1], torch.zeros_like(before)))
    return block * _BLOCK + _first_above(inside, target), total


def _first_above(sums: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
    return (sums <= target[:, None]).sum(dim=1).clamp_(max=sums.shape[1] - 1)


def _restrict(scores: "torch.Tensor", knobs: Knobs, greedy: np.ndarray) -> None:
    """Set what min-p, top-k and then top-p leave out to -inf, in place; rows that ask for none are not touched."""
    import torch

    likely = np.flatnonzero((knobs.min_p > 0) & ~greedy)
    if len(likely):
        share = torch.from_numpy(np.log(knobs.min_p[likely]).astype(np.float32)).to(scores.device)
        _keep(scores, likely, scores[likely].max(dim=1).values + share)
    cut = np.flatnonzero((knobs.top_k > 0) & ~greedy)
    if len(cut):
        _keep(scores, cut, _kth_scores(scores[cut], knobs.top_k[cut]))
    nucleus = np.flatnonzero((knobs.top_p < 1) & ~greedy)
    if len(nucleus):
        _keep(scores, nucleus, _nucleus_scores(scores[nucleus], knobs.top_p[nucleus]))


def _keep(scores: "torch.Tensor", rows: np.ndarray, least: "torch.Tensor") -> None:
    part = scores[rows]
    scores[rows] = part.masked_fill(part < least[:, None], float("-inf"))


def _kth_scores(scores: "torch.Tensor", top_k: np.ndarray) -> "torch.Tensor":
    kth = np.minimum(top_k, scores.shape[1])
    best = scores.topk(int(kth.max()), dim=1).values
    return best[np.arange(len(kth)), kth - 1]


def _nucleus_scores(scores: "torch.Tensor", top_p: np.ndarray) -> "torch.Tensor":
    """The score of the last token of each row's smallest set that holds `top_p` of the probability."""
    import torch

    weights = (scores - scores.max(dim=1, keepdim=True).values).exp_()
    wanted = (
        torch.from_numpy(top_p).to(scores.device)
        * _invert(weights, torch.zeros(len(scores), dtype=torch.float64, device=scores.device))[1]
    )
    width = min(_FIRST_GUESS, scores.shape[1])
    while True:
        best, order = scores.topk(width, dim=1)
        sums = weights.gather(1, order).cumsum(dim=1, dtype=torch.float64)
        if width == scores.shape[1] or bool((sums[:, -1] >= wanted).all()):
            last = (sums < wanted[:, None]).sum(dim=1).clamp_(max=width - 1)
            return best.gather(1, last[:, None])[:, 0]
        width = min(16 * width, scores.shape[1])
