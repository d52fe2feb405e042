"""The native engine's inner loops on a CPU, compiled by numba.

Every loop computes one token by itself and in a fixed order, so its bits cannot depend on the tokens beside it; that
is what makes batches exact. Numbers are float32; bfloat16 tensors come as their bits in uint16 (`as_array`) and are
widened where they are read, rounded to nearest even where they are written.

Shapes: T tokens, R rows, D dimensions, I inputs, O outputs, r rank.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import overload

from .compiled import FAST, compiled

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


def widen(x: Any) -> Any:
    """A stored number as float32."""
    return x


def narrow(x: Any, like: Any) -> Any:
    """A float32 as `like` is stored."""
    return x


@overload(widen, inline="always", strict=False)
def _widen_typed(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow, inline="always", strict=False)
def _narrow_typed(x: Any, like: Any) -> Any:
    if like == types.uint16:

        def rounded(x: Any, like: Any) -> Any:
            bits = np.float32(x).view(np.uint32)
            if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # NaN stays NaN
                return np.uint16(0x7FC0)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return rounded
    return lambda x, like: np.float32(x)


@njit(inline="always", **FAST)
def exp_(x: Any) -> Any:
    """e^x for x ≤ 0 in float32, to 2 units in the last place (Cephes' expf); vectorises, which libm's does not."""
    x = max(x, _LOWEST)
    n = np.floor(x * _LOG2E + _HALF)
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    y = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (y * f * f + f + _ONE) * power


@njit(inline="always", **FAST)
def rotate(x: Any, cos: Any, sin: Any, weight: Any, eps: Any, out: Any) -> None:
    """Turn one head `[D]` by its position's `cos` and `sin` `[D]` into `out`; a weight `[D]` norms it first, an empty
    one does not."""
    half = x.shape[0] // 2
    factor = _ONE
    if weight.shape[0]:
        squares = _ZERO
        for d in range(2 * half):
            number = widen(x[d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(2 * half) + eps)
    for d in range(half):
        low, high = widen(x[d]) * factor, widen(x[d + half]) * factor
        if weight.shape[0]:
            low, high = low * widen(weight[d]), high * widen(weight[d + half])
        out[d] = low * cos[d] - high * sin[d]
        out[d + half] = high * cos[d + half] + low * sin[d + half]


@compiled(**FAST)
def rms_norm(x: Any, weight: Any, offset: Any, eps: Any, out: Any) -> None:
    """`out = x / sqrt(mean(x²) + eps) · (offset + weight)` for rows `[R, D]` (Zhang, Sennrich 2019)."""
    for r in range(x.shape[0]):
        squares = _ZERO
        for d in range(x.shape[1]):
            number = widen(x[r, d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        for d in range(x.shape[1]):
            out[r, d] = narrow(widen(x[r, d]) * factor * (offset + widen(weight[d])), out[r, d])


@compiled(**FAST)
def add_and_norm(x: Any, update: Any, weight: Any, eps: Any, out: Any) -> None:
    """`x += update`, and the RMS norm of the sum into `out`, rows `[R, D]`."""
    for r in range(x.shape[0]):
        squares = _ZERO
        for d in range(x.shape[1]):
            x[r, d] = narrow(widen(x[r, d]) + widen(update[r, d]), x[r, d])
            number = widen(x[r, d])
            squares += number * number
        factor = _ONE / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        for d in range(x.shape[1]):
            out[r, d] = narrow(widen(x[r, d]) * factor * widen(weight[d]), out[r, d])


@compiled(**FAST)
def silu_multiply(gate: Any, up: Any) -> None:
    """`gate = gate · sigmoid(gate) · up` in place, element by element `[n]` (SwiGLU: Shazeer 2020)."""
    for i in range(gate.shape[0]):
        x = widen(gate[i])
        e = exp_(-abs(x))
        sigmoid = (_ONE if x >= _ZERO else e) / (_ONE + e)
        gate[i] = narrow(x * sigmoid * widen(up[i]), gate[i])


@compiled(**FAST)
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
                row[o] = narrow(widen(row[o]) + (low + high), row[o])


@njit(inline="always", **FAST)
def _shrink(x: Any, a: Any, hidden: Any) -> None:
    """`hidden = a @ x` for one token; eight sums at once hide the latency of each."""
    for j in range(0, a.shape[0], 8):
        s0, s1, s2, s3, s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(x.shape[0]):
            number = widen(x[i])
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
