"""Drawing tokens on a CPU, compiled by numba: softmax, filters and the inverse CDF of one row after the other.

A row is computed by itself, in an order that its length alone decides, and sums are written out lane by lane instead of
being left to the compiler: the same logits give the same bits whatever rows stand beside them.

Shapes: n rows, V tokens of the vocabulary.
"""

import numpy as np

from .compiled import compiled

_BLOCK = 256
"""Weights are summed by blocks of this many, so that a draw scans blocks first and then one of them."""
_LANES = 16
_BIN_BITS = 10
_BINS = 1 << _BIN_BITS

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ROUND = np.float32(12582912.0)
"""Adding and taking away 1.5 · 2^23 rounds a float32 to a whole number."""
_LOWEST = np.float32(-87.0)
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled()
def draw_rows(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_p: np.ndarray,
    top_k: np.ndarray,
    min_p: np.ndarray,
    top_logprobs: np.ndarray,
    uniform: np.ndarray,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    top_ids: np.ndarray,
    top_values: np.ndarray,
) -> None:
    """Draw every row of `logits` `[n, V]` into `tokens` and `logprobs` `[n]`, as `sampling.draw` says.

    Rows that ask for top log-probs get them in the first places of their `top_ids` and `top_values` `[n, k]`; the other
    places are left as they are.
    """
    size = logits.shape[1]
    blocks = (size + _BLOCK - 1) // _BLOCK
    weights = np.zeros(blocks * _BLOCK, np.float32)
    sums = np.empty(blocks, np.float64)
    lanes = np.empty(_LANES, np.float64)
    for row in range(len(logits)):
        scores = logits[row]
        greedy = temperature[row] == 0
        scale = _ONE if greedy else np.float32(min(1 / temperature[row], 3e38))
        best = _maximum(scores)
        _weigh(scores, best, scale, weights)
        total = _sum_blocks(weights, sums, lanes)
        if not total > 0:  # a logit was not a finite number
            tokens[row], logprobs[row] = 0, np.nan
            continue
        if not greedy and (min_p[row] > 0 or 0 < top_k[row] < size or top_p[row] < 1):
            total = _restrict(weights, sums, lanes, total, min_p[row], top_k[row], top_p[row])
        token = _first_of(scores, best) if greedy else _invert(weights, sums, uniform[row] * total)
        log_total = np.log(total)
        tokens[row] = token
        logprobs[row] = np.float64((scores[token] - best) * scale) - log_total
        if top_logprobs[row] > 0:
            ids, values = top_ids[row, : top_logprobs[row]], top_values[row, : top_logprobs[row]]
            _likeliest(scores, weights, ids, values)
            for i in range(len(values)):
                values[i] = np.float64((values[i] - best) * scale) - log_total


@compiled()
def _maximum(scores: np.ndarray) -> np.float32:
    lanes = np.full(64, -np.inf, np.float32)
    whole = scores.size - scores.size % 64
    for i in range(0, whole, 64):
        for j in range(64):
            lanes[j] = scores[i + j] if scores[i + j] > lanes[j] else lanes[j]
    best = lanes[0]
    for j in range(1, 64):
        best = max(best, lanes[j])
    for i in range(whole, scores.size):
        best = max(best, scores[i])
    return best


@compiled()
def _weigh(scores: np.ndarray, best: np.float32, scale: np.float32, weights: np.ndarray) -> None:
    """exp((scores − best) · scale), to 2 units in the last place (Cephes' expf), 0 below e^-87; not a number stays so.

    Written out because LLVM does not turn calls of libm's exp into vectors; unlike `kernels.exp_` without reordering.
    """
    for i in range(scores.size):
        exponent = (scores[i] - best) * scale
        x = exponent if exponent > _LOWEST else _LOWEST
        n = (x * _LOG2E + _ROUND) - _ROUND
        f = (x - n * _LN2_HIGH) - n * _LN2_LOW
        y = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        weights[i] = _ZERO if exponent < _LOWEST else (y * f * f + f + _ONE) * power + (exponent - exponent)


@compiled()
def _sum_blocks(weights: np.ndarray, sums: np.ndarray, lanes: np.ndarray) -> float:
    """Fill in the sum of every block of weights; gives the sum of all."""
    total = 0.0
    for block in range(len(sums)):
        lanes[:] = 0
        for i in range(block * _BLOCK, (block + 1) * _BLOCK, _LANES):
            for j in range(_LANES):
                lanes[j] += weights[i + j]
        part = 0.0
        for j in range(_LANES):
            part += lanes[j]
        sums[block] = part
        total += part
    return total


@compiled()
def _first_of(scores: np.ndarray, value: np.float32) -> int:
    for i in range(scores.size):
        if scores[i] == value:
            return i
    return 0


@compiled()
def _invert(weights: np.ndarray, sums: np.ndarray, target: float) -> int:
    """The first token at which the running sum exceeds `target`, or the last one that has any weight."""
    before, block = 0.0, -1
    for b in range(len(sums)):
        if sums[b] > 0:
            before += sums[block] if block >= 0 else 0.0
            block = b
            if before + sums[b] > target:
                break
    token = -1
    for i in range(block * _BLOCK, (block + 1) * _BLOCK):
        if weights[i] > 0:
            token = i
            before += weights[i]
            if before > target:
                break
    return token


@compiled()
def _restrict(
    weights: np.ndarray, sums: np.ndarray, lanes: np.ndarray, total: float, min_p: float, top_k: int, top_p: float
) -> float:
    """Set the weights that min-p, then top-k, then top-p leave out to 0; gives the sum of the others."""
    if min_p > 0:  # the best token's weight is 1
        _keep(weights, np.float32(min_p))
    if top_k > 0:
        _keep(weights, _least(weights, False, float(top_k)))
    if top_p < 1:
        total = _sum_blocks(weights, sums, lanes)
        _keep(weights, _least(weights, True, top_p * total))
    return _sum_blocks(weights, sums, lanes)


@compiled()
def _keep(weights: np.ndarray, least: np.float32) -> None:
    for i in range(weights.size):
        weights[i] = weights[i] if weights[i] >= least else _ZERO


@compiled()
def _least(weights: np.ndarray, by_weight: bool, wanted: float) -> np.float32:
    """The weight with which the best tokens, one by one, reach `wanted` in all: in weight, or in number.

    Numbers from 0 to 1 are in the order of their 30 bits: ten of them at a time say in which of 1024 bins that happens.
    """
    bits, measures = weights.view(np.int32), np.empty(_BINS, np.float64)
    reached, leading = 0.0, 0
    for shift in range(30 - _BIN_BITS, -1, -_BIN_BITS):
        measures[:] = 0
        for i in range(weights.size):
            if bits[i] >> (shift + _BIN_BITS) == leading:
                measures[(bits[i] >> shift) % _BINS] += weights[i] if by_weight else 1.0
        place = _BINS - 1
        while place > 0 and reached + measures[place] < wanted:
            reached += measures[place]
            place -= 1
        leading = leading * _BINS + place
    return np.int32(leading).view(np.float32)


@compiled()
def _likeliest(scores: np.ndarray, weights: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    """The best tokens that have any weight, and their scores, best first, equals by id; then -inf."""
    ids[:] = 0
    values[:] = -np.inf
    for token in range(scores.size):
        if scores[token] > values[-1] and weights[token] > 0:
            place = len(values) - 1
            while place > 0 and scores[token] > values[place - 1]:
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = scores[token], token
