"""The native engine's inner loops on a CPU, compiled by numba.

Every loop computes one token by itself and in a fixed order, so its bits cannot depend on the tokens beside it; that
is what makes batches exact. Numbers are float32; bfloat16 tensors come as their bits in uint16 (`as_array`) and are
widened where they are read, rounded to nearest even where they are written.

Shapes: T tokens, H heads, K key-value heads, D head dimensions, N blocks of the cache, B tokens a block, I inputs,
O outputs, r rank.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import overload

BLOCK = 32
"""Tokens of a cache block."""

# Reordering sums is what makes loops vectors; NaN and infinity keep their meaning (diverged weights must show).
_FLAGS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "cache": True, **_FLAGS}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


def as_array(tensor: Any) -> np.ndarray:
    """A CPU tensor's memory as a numpy array: float32 as it is, bfloat16 as its bits in uint16."""
    import torch

    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _widen(x: Any) -> Any:
    """A stored number as float32."""
    return x


def _narrow(x: Any, like: Any) -> Any:
    """A float32 as `like` is stored."""
    return x


@overload(_widen, inline="always", strict=False)
def _widen_typed(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(_narrow, inline="always", strict=False)
def _narrow_typed(x: Any, like: Any) -> Any:
    if like == types.uint16:

        def rounded(x: Any, like: Any) -> Any:
            bits = np.float32(x).view(np.uint32)
            if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # NaN stays NaN
                return np.uint16(0x7FC0)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return rounded
    return lambda x, like: np.float32(x)


@njit(inline="always", **_FLAGS)
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0 in float32, to 2 units in the last place (Cephes' expf); vectorises, which libm's does not."""
    x = max(x, _LOWEST)
    n = np.floor(x * _LOG2E + _HALF)
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    y = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (y * f * f + f + _ONE) * power


@njit(**_OPTIONS)
def store(keys: Any, values: Any, k: Any, v: Any, rows: Any, positions: Any, tables: Any) -> None:
    """Write tokens' states `[T, K, D]` to their places in the cache: `keys` and `values` `[N, K, B, D]`."""
    for t in range(k.shape[0]):
        block, place = tables[rows[t], positions[t] // BLOCK], positions[t] % BLOCK
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                keys[block, h, place, d] = k[t, h, d]
                values[block, h, place, d] = v[t, h, d]


@njit(**_OPTIONS)
def rotate_and_store(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, eps: Any,
    keys: Any, values: Any, rows: Any, positions: Any, tables: Any, out: Any, scratch: Any,
) -> None:  # fmt: skip
    """Rotary positions (Su et al. 2021) for queries `[T, H, D]`, into `out`, and for keys, into the cache; values too.

    `cos` and `sin` are `[T, D]`. Weights `[D]` first norm every head, as Qwen3 does; empty ones do not.
    """
    size = q.shape[2]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            _rotate(q[t, h], cos[t], sin[t], q_weight, eps, out[t, h])
        block, place = tables[rows[t], positions[t] // BLOCK], positions[t] % BLOCK
        for h in range(k.shape[1]):
            _rotate(k[t, h], cos[t], sin[t], k_weight, eps, scratch)
            for d in range(size):
                keys[block, h, place, d] = _narrow(scratch[d], keys[block, h, place, d])
            for d in range(v.shape[2]):
                values[block, h, place, d] = v[t, h, d]


@njit(inline="always", **_FLAGS)
def _rotate(x: Any, cos: Any, sin: Any, weight: Any, eps: Any, out: Any) -> None:
    half = x.shape[0] // 2
    factor = _ONE
    if weight.shape[0]:
        squares = _ZERO
        for d in range(2 * half):
            number = _widen(x[d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(2 * half) + eps)
    for d in range(half):
        low, high = _widen(x[d]) * factor, _widen(x[d + half]) * factor
        if weight.shape[0]:
            low, high = low * _widen(weight[d]), high * _widen(weight[d + half])
        out[d] = low * cos[d] - high * sin[d]
        out[d + half] = high * cos[d + half] + low * sin[d + half]


@njit(**_OPTIONS)
def attend(
    q: Any, keys: Any, values: Any, rows: Any, positions: Any, tables: Any,
    scale: Any, window: int, cap: Any, out: Any, scores: Any,
) -> None:  # fmt: skip
    """Attention of each token `q` `[T, H, D]` over its row's places 0 … position into `out` `[T, H, D]`, all float32.

    `window` > 0 leaves out places that many or more before the token; `cap` > 0 soft-caps the scores (Gemma 2).
    `scores` is scratch memory for all places of a row, in whole blocks.
    """
    heads, size = q.shape[1], q.shape[2]
    shared = heads // keys.shape[1]
    for t in range(q.shape[0]):
        end = positions[t] + 1
        begin = max(0, end - window) if window > 0 else 0
        first, last = begin // BLOCK, (end + BLOCK - 1) // BLOCK
        table = tables[rows[t]]
        for h in range(heads):
            _score(q[t, h], keys, h // shared, table, first, last, scale, cap, scores)
            total = _softmax(scores, begin, end)
            o = out[t, h]
            for d in range(size):
                o[d] = _ZERO
            _gather(values, h // shared, table, begin, end, scores, o)
            for d in range(size):
                o[d] = o[d] / total


@njit(inline="always", **_FLAGS)
def _score(q: Any, keys: Any, head: Any, table: Any, first: Any, last: Any, scale: Any, cap: Any, scores: Any) -> None:
    """Scaled scores of whole blocks; a place beyond the row's end gets any number, which is not read."""
    for n in range(first, last):
        k = keys[table[n], head]
        s = scores[n * BLOCK : (n + 1) * BLOCK]
        for b in range(0, BLOCK, 4):  # four sums at once hide the latency of each
            s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
            for d in range(q.shape[0]):
                number = q[d]
                s0 += number * _widen(k[b, d])
                s1 += number * _widen(k[b + 1, d])
                s2 += number * _widen(k[b + 2, d])
                s3 += number * _widen(k[b + 3, d])
            s[b], s[b + 1], s[b + 2], s[b + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
        if cap > 0:
            for b in range(BLOCK):
                s[b] = cap * np.tanh(s[b] / cap)


@njit(inline="always", **_FLAGS)
def _softmax(scores: Any, begin: Any, end: Any) -> Any:
    """Turn the scores of places begin … end - 1 into weights, in place; returns their sum."""
    top = scores[begin]
    for i in range(begin + 1, end):
        top = max(top, scores[i])
    total = _ZERO
    for i in range(begin, end):
        weight = _exp(scores[i] - top)
        scores[i] = weight
        total += weight
    return total


@njit(inline="always", **_FLAGS)
def _gather(values: Any, head: Any, table: Any, begin: Any, end: Any, weights: Any, out: Any) -> None:
    """Add the weighted values of places begin … end - 1 to `out` `[D]`; no other place is read, it could hold NaN."""
    i = begin
    while i < end:
        v = values[table[i // BLOCK], head]
        b = i % BLOCK
        stop = min(end - i, BLOCK - b)
        j = 0
        while j + 8 <= stop:
            w0, w1, w2, w3 = weights[i + j], weights[i + j + 1], weights[i + j + 2], weights[i + j + 3]
            w4, w5, w6, w7 = weights[i + j + 4], weights[i + j + 5], weights[i + j + 6], weights[i + j + 7]
            p = b + j
            for d in range(out.shape[0]):
                low = w0 * _widen(v[p, d]) + w1 * _widen(v[p + 1, d]) + w2 * _widen(v[p + 2, d])
                high = w4 * _widen(v[p + 4, d]) + w5 * _widen(v[p + 5, d]) + w6 * _widen(v[p + 6, d])
                out[d] += (low + w3 * _widen(v[p + 3, d])) + (high + w7 * _widen(v[p + 7, d]))
            j += 8
        while j < stop:
            for d in range(out.shape[0]):
                out[d] += weights[i + j] * _widen(v[b + j, d])
            j += 1
        i += stop


@njit(**_OPTIONS)
def rms_norm(x: Any, weight: Any, offset: Any, eps: Any, out: Any) -> None:
    """`out = x / sqrt(mean(x²) + eps) · (offset + weight)` for rows `[R, D]` (Zhang, Sennrich 2019)."""
    for r in range(x.shape[0]):
        squares = _ZERO
        for d in range(x.shape[1]):
            number = _widen(x[r, d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        for d in range(x.shape[1]):
            out[r, d] = _narrow(_widen(x[r, d]) * factor * (offset + _widen(weight[d])), out[r, d])


@njit(**_OPTIONS)
def add_and_norm(x: Any, update: Any, weight: Any, eps: Any, out: Any) -> None:
    """`x += update`, and the RMS norm of the sum into `out`, rows `[R, D]`."""
    for r in range(x.shape[0]):
        squares = _ZERO
        for d in range(x.shape[1]):
            x[r, d] = _narrow(_widen(x[r, d]) + _widen(update[r, d]), x[r, d])
            number = _widen(x[r, d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        for d in range(x.shape[1]):
            out[r, d] = _narrow(_widen(x[r, d]) * factor * _widen(weight[d]), out[r, d])


@njit(**_OPTIONS)
def silu_multiply(gate: Any, up: Any, out: Any) -> None:
    """`out = gate · sigmoid(gate) · up`, element by element `[n]` (SwiGLU: Shazeer 2020)."""
    for i in range(gate.shape[0]):
        x = _widen(gate[i])
        e = _exp(-abs(x))
        sigmoid = (_ONE if x >= _ZERO else e) / (_ONE + e)
        out[i] = _narrow(x * sigmoid * _widen(up[i]), out[i])


@njit(**_OPTIONS)
def add_lora(x: Any, which: Any, a: Any, b: Any, out: Any, hidden: Any) -> None:
    """Add each token's own low-rank product: `out[t] += (a[which[t]] @ x[t]) @ b[which[t]]`; -1 adds nothing.

    `x` `[T, I]`, `a` `[n, r, I]`, `b` `[n, r, O]`, `out` `[T, O]`, scratch memory `hidden` `[r]`; r is a multiple of 8.
    """
    rank, outputs = a.shape[1], out.shape[1]
    for t in range(x.shape[0]):
        index = which[t]
        if index < 0:
            continue
        _shrink(x[t], a[index], hidden)
        row, factors = out[t], b[index]
        for j in range(0, rank, 8):
            h0, h1, h2, h3 = hidden[j], hidden[j + 1], hidden[j + 2], hidden[j + 3]
            h4, h5, h6, h7 = hidden[j + 4], hidden[j + 5], hidden[j + 6], hidden[j + 7]
            for o in range(outputs):
                low = h0 * factors[j, o] + h1 * factors[j + 1, o] + h2 * factors[j + 2, o] + h3 * factors[j + 3, o]
                high = h4 * factors[j + 4, o] + h5 * factors[j + 5, o] + h6 * factors[j + 6, o] + h7 * factors[j + 7, o]
                row[o] = _narrow(_widen(row[o]) + (low + high), row[o])


@njit(inline="always", **_FLAGS)
def _shrink(x: Any, a: Any, hidden: Any) -> None:
    """`hidden = a @ x` for one token; eight sums at once hide the latency of each."""
    for j in range(0, a.shape[0], 8):
        s0, s1, s2, s3, s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(x.shape[0]):
            number = _widen(x[i])
            s0 += number * a[j, i]
            s1 += number * a[j + 1, i]
            s2 += number * a[j + 2, i]
            s3 += number * a[j + 3, i]
            s4 += number * a[j + 4, i]
            s5 += number * a[j + 5, i]
            s6 += number * a[j + 6, i]
            s7 += number * a[j + 7, i]
        hidden[j], hidden[j + 1], hidden[j + 2], hidden[j + 3] = s0, s1, s2, s3
        hidden[j + 4], hidden[j + 5], hidden[j + 6], hidden[j + 7] = s4, s5, s6, s7
