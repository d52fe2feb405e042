"""Attention over the paged cache on a CPU.

Neighbouring tokens of a row, and the query heads that share a key head, go through the cache together in one tile; what
each of them gets is computed by itself, so its bits do not depend on who went along.

Shapes: T tokens, H heads, K key-value heads, D head dimensions, E the values' dimensions in whole panels, N blocks of
the cache, B tokens a block. Keys lie `[N, K, D, B]` and values `[N, K, B, E]`, each the panels that its product wants.
"""

from typing import Any

import numpy as np

from .blocks import BLOCK
from .compiled import FAST, compiled
from .kernels import exp_, narrow, rotate
from .tiles import HEIGHTS, PANEL, height_of, multiply_tile

ROWS = HEIGHTS[0]
"""Queries that go together at most."""

_ZERO, _ONE = np.float32(0), np.float32(1)
_ZEROS = np.zeros(PANEL, np.float32)


def padded(size: int) -> int:
    """Dimensions of the values in whole panels."""
    return -(-size // PANEL) * PANEL


class Scratch:
    """Memory for one call of `attend` at a time: rows of `places` tokens, `shared` query heads a key head, keys of
    `size` dimensions, values of `width` in whole panels."""

    def __init__(self, places: int, shared: int, size: int, width: int) -> None:
        together = max(ROWS, shared)
        shapes = ((together, size), (together, -(-places // BLOCK) * BLOCK), (together, width), (BLOCK,))
        self.arrays = tuple(np.empty(shape, np.float32) for shape in shapes)
        """The last arguments of `attend`: queries, scores, sums and lanes."""


@compiled(**FAST)
def store(keys: Any, values: Any, k: Any, v: Any, rows: Any, positions: Any, tables: Any) -> None:
    """Write tokens' states `[T, K, D]` to their places in the cache."""
    for t in range(k.shape[0]):
        block, place = tables[rows[t], positions[t] // BLOCK], positions[t] % BLOCK
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                keys[block, h, d, place] = k[t, h, d]
            for d in range(v.shape[2]):
                values[block, h, place, d] = v[t, h, d]


@compiled(**FAST)
def rotate_and_store(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, eps: Any,
    keys: Any, values: Any, rows: Any, positions: Any, tables: Any, out: Any, scratch: Any,
) -> None:  # fmt: skip
    """Rotary positions (Su et al. 2021) for queries `[T, H, D]`, into `out`, and for keys, into the cache; values too.

    `cos` and `sin` are `[T, D]`. Weights `[D]` first norm every head, as Qwen3 does; empty ones do not.
    """
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            rotate(q[t, h], cos[t], sin[t], q_weight, eps, out[t, h])
        block, place = tables[rows[t], positions[t] // BLOCK], positions[t] % BLOCK
        for h in range(k.shape[1]):
            rotate(k[t, h], cos[t], sin[t], k_weight, eps, scratch)
            for d in range(k.shape[2]):
                keys[block, h, d, place] = narrow(scratch[d], keys[block, h, d, place])
            for d in range(v.shape[2]):
                values[block, h, place, d] = v[t, h, d]


@compiled(**FAST)
def attend(
    q: Any, keys: Any, values: Any, rows: Any, positions: Any, tables: Any,
    scale: Any, window: int, cap: Any, out: Any, queries: Any, scores: Any, sums: Any, lanes: Any,
) -> None:  # fmt: skip
    """Attention of each token `q` `[T, H, D]` over its row's places 0 … position into `out` `[T, H, ≤ E]`, all float32.

    `window` > 0 leaves out places that many or more before the token; `cap` > 0 soft-caps the scores (Gemma 2).
    `queries`, `scores`, `sums` and `lanes` are those of a `Scratch`.
    """
    shared = q.shape[1] // keys.shape[1]
    together = max(1, ROWS // shared)
    begin = 0
    while begin < q.shape[0]:
        end = begin + 1  # tokens that follow one another in their row
        while (
            end < q.shape[0]
            and end - begin < together
            and rows[end] == rows[begin]
            and positions[end] == positions[end - 1] + 1
        ):
            end += 1
        for h in range(keys.shape[1]):
            _attend_together(
                q, keys, values, positions, tables[rows[begin]], scale, window, cap, out, queries, scores, sums,
                lanes, begin, end, h, shared,
            )  # fmt: skip
        begin = end


@compiled(**FAST)
def _attend_together(
    q: Any, keys: Any, values: Any, positions: Any, table: Any, scale: Any, window: int, cap: Any, out: Any,
    queries: Any, scores: Any, sums: Any, lanes: Any, begin: int, end: int, h: int, shared: int,
) -> None:  # fmt: skip
    """The tokens `begin` … `end - 1` of one row, for the queries that share key head `h`."""
    count = (end - begin) * shared
    first = max(0, positions[begin] + 1 - window) if window > 0 else 0
    last = positions[end - 1] + 1
    for r in range(count):
        for d in range(q.shape[2]):
            queries[r, d] = q[begin + r // shared, h * shared + r % shared, d] * scale
        for e in range(sums.shape[1]):
            sums[r, e] = _ZERO
    _score(queries, keys, h, table, first, last, count, scores)
    for r in range(count):
        stop = positions[begin + r // shared] + 1
        start = max(0, stop - window) if window > 0 else 0
        own = scores[r, start:stop]
        if cap > 0:
            for i in range(own.shape[0]):
                own[i] = cap * np.tanh(own[i] / cap)
        _softmax(own, lanes)
        scores[r, first:start] = _ZERO
        scores[r, stop:last] = _ZERO
    _gather(scores, values, h, table, first, last, count, sums)
    for r in range(count):
        o = out[begin + r // shared, h * shared + r % shared]
        for e in range(o.shape[0]):
            o[e] = sums[r, e]


@compiled(**FAST)
def _score(queries: Any, keys: Any, h: int, table: Any, first: int, last: int, count: int, scores: Any) -> None:
    """Scores of whole blocks; a place beyond the row's end gets any number, which is not read."""
    size, width, x_step = queries.shape[1], keys.itemsize, queries.shape[1] * 4
    for n in range(first // BLOCK, (last + BLOCK - 1) // BLOCK):
        block = keys.ctypes.data + (table[n] * keys.shape[1] + h) * size * BLOCK * width
        for c in range(0, BLOCK, PANEL):
            r = 0
            while r < count:
                height, step = height_of(count - r), scores.shape[1] * 4
                to = scores.ctypes.data + r * step + (n * BLOCK + c) * 4
                x = queries.ctypes.data + r * x_step
                panel = block + c * width
                multiply_tile(keys, height, x, x_step, panel, BLOCK * width, size, _ZEROS.ctypes.data, 0, to, step)  # pyright: ignore[reportCallIssue]
                r += height


@compiled(**FAST)
def _largest(scores: Any, lanes: Any) -> Any:
    """The largest score, found lane by lane: of a plain loop the compiler makes no vectors where numbers may be NaN."""
    for j in range(BLOCK):
        lanes[j] = scores[0]
    whole = scores.shape[0] // BLOCK
    for n in range(whole):
        block = scores[n * BLOCK : (n + 1) * BLOCK]
        for j in range(BLOCK):
            lanes[j] = block[j] if block[j] > lanes[j] else lanes[j]
    top = lanes[0]
    for j in range(1, BLOCK):
        top = max(top, lanes[j])
    for j in range(whole * BLOCK, scores.shape[0]):
        top = max(top, scores[j])
    return top


@compiled(**FAST)
def _softmax(scores: Any, lanes: Any) -> None:
    """Turn scores into weights whose sum is 1, in place."""
    top = _largest(scores, lanes)
    total = _ZERO
    for i in range(scores.shape[0]):  # from 0 on: with any other beginning numba looks for negative places in each turn
        weight = exp_(scores[i] - top)
        scores[i] = weight
        total += weight
    share = _ONE / total
    for i in range(scores.shape[0]):
        scores[i] *= share


@compiled(**FAST)
def _gather(weights: Any, values: Any, h: int, table: Any, first: int, last: int, count: int, sums: Any) -> None:
    """Add the weighted values of places first … last - 1; no other place is read, it could hold NaN."""
    width, step = values.itemsize, values.shape[3] * values.itemsize
    i = first
    while i < last:
        inputs = min(last - i, BLOCK - i % BLOCK)
        block = values.ctypes.data + ((table[i // BLOCK] * values.shape[1] + h) * BLOCK + i % BLOCK) * step
        for c in range(0, values.shape[3], PANEL):
            r = 0
            while r < count:
                height, out_step, x_step = height_of(count - r), sums.shape[1] * 4, weights.shape[1] * 4
                x, to = weights.ctypes.data + r * x_step + i * 4, sums.ctypes.data + r * out_step + c * 4
                panel = block + c * width
                multiply_tile(values, height, x, x_step, panel, step, inputs, to, out_step, to, out_step)  # pyright: ignore[reportCallIssue]
                r += height
        i += inputs
