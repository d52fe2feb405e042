"""The native engine's inner loops on a GPU, compiled by Triton.

As on a CPU, what a program computes for one token does not depend on the tokens beside it: sums go over a row's own
places in pieces that begin where the row does. Numbers are float32 inside, whatever is stored.

Shapes: T tokens, H query heads, K key-value heads, D head dimensions, E the values' dimensions in whole panels, B
tokens a block, M blocks a row can have, C hidden size, I inputs, O outputs, r rank, n adapters.
"""

# Triton comes with torch's builds for GPUs alone, and its kernels take a grid in brackets.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl

from .blocks import BLOCK

CHUNK = 8 * BLOCK
"""Places of a row that one program of the attention goes through; a long row has several, whose sums are joined."""
_ROWS = 64
"""Queries that go through the cache together, of neighbouring tokens of a row."""
_LEAST = 16
"""Rows of the smallest product."""
_WIDE = 1024


def tokens_of_a_tile(shared: int) -> int:
    """Neighbouring tokens of a row that go together where `shared` query heads have one key head."""
    return max(1, _ROWS // triton.next_power_of_2(shared))


@triton.jit
def _read(places, there):
    """Numbers as float32, 0 where there are none."""
    return tl.load(places, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(
    k, v, keys, values, rows, positions, tables, k_step, v_step, K, D, Dv, E, M, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t)
    block = tl.load(tables + tl.load(rows + t) * M + position // B).to(tl.int64)
    place, d = position % B, tl.arange(0, W)
    key = tl.load(k + t * k_step + h * D + d, mask=d < D)
    tl.store(keys + ((block * K + h) * D + d) * B + place, key, mask=d < D)
    value = tl.load(v + t * v_step + h * Dv + d, mask=d < Dv)
    tl.store(values + ((block * K + h) * B + place) * E + d, value, mask=d < Dv)


def store(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: Any) -> None:
    """Write tokens' states `[T, K, D]`, whose last two dimensions lie together, to their places in the cache."""
    heads, size, width = k.shape[1], k.shape[2], v.shape[2]
    _store[(len(k), heads)](
        k, v, keys, values, places.rows, places.positions, places.tables, k.stride(0), v.stride(0), heads, size, width,
        values.shape[3], places.tables.shape[1], BLOCK, triton.next_power_of_2(max(size, width)), num_warps=1,
    )  # fmt: skip


@triton.jit
def _rotate_and_store(
    x, cos, sin, q_weight, k_weight, eps, out, keys, values, rows, positions, tables, H, K, E, M,
    D: tl.constexpr, W: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t)
    d = tl.arange(0, W)
    there = d < D
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    own = x + (t * (H + 2 * K) + h) * D
    low, high = _read(own + d, there), _read(own + other, there)
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(low * low) / D + eps)
        of_q, of_k = there & (h < H), there & (h >= H)
        low *= factor * (_read(q_weight + d, of_q) + _read(k_weight + d, of_k))
        high *= factor * (_read(q_weight + other, of_q) + _read(k_weight + other, of_k))
    c = tl.load(cos + position.to(tl.int64) * D + d, mask=there, other=0.0)
    s = tl.load(sin + position.to(tl.int64) * D + d, mask=there, other=0.0)
    turned = low * c + tl.where(d < half, -high, high) * s
    if h < H:
        tl.store(out + (t * H + h) * D + d, turned.to(out.dtype.element_ty), mask=there)
    else:
        block = tl.load(tables + tl.load(rows + t) * M + position // B).to(tl.int64)
        head, place = h - H, position % B
        tl.store(keys + ((block * K + head) * D + d) * B + place, turned.to(keys.dtype.element_ty), mask=there)
        value = tl.load(own + K * D + d, mask=there)
        tl.store(values + ((block * K + head) * B + place) * E + d, value, mask=there)


def rotate_and_store(
    x: torch.Tensor, heads: int, turns: tuple[torch.Tensor, torch.Tensor], norms: tuple[Any, Any, float] | None,
    keys: torch.Tensor, values: torch.Tensor, places: Any,
) -> torch.Tensor:  # fmt: skip
    """Rotary positions (Su et al. 2021) for the queries of `x` `[T, (H + 2K) D]`, which are returned, `[T, H, D]`, and
    for its keys, which go into the cache with its values.

    `turns` are cos and sin `[positions, D]`; `norms` the weights `[D]` of RMS norms of each query and key before, and
    their epsilon.
    """
    kinds, size = keys.shape[1], keys.shape[2]
    out = torch.empty((len(x), heads, size), dtype=x.dtype, device=x.device)
    q_weight, k_weight, eps = norms or (x, x, 0.0)
    _rotate_and_store[(len(x), heads + kinds)](
        x, *turns, q_weight, k_weight, eps, out, keys, values, places.rows, places.positions, places.tables, heads,
        kinds, values.shape[3], places.tables.shape[1], size, triton.next_power_of_2(size), BLOCK, norms is not None,
        num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    q, keys, values, rows, positions, tables, begins, counts, out, tops, sums, scale, window, cap, T, H, K, D, Dv, E, M,
    SHARED: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, V: tl.constexpr, B: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + tile)
    begin = tl.load(begins + tile)
    if count > 0:
        r = tl.arange(0, ROWS)
        token = begin + r // G
        there = (r // G < count) & (r % G < SHARED)
        position = tl.load(positions + token, mask=r // G < count, other=-1)
        last = tl.max(position)
        first = chunk * BLOCKS
        end = tl.minimum(first + BLOCKS, last // B + 1)
        if window > 0:
            least = tl.min(tl.where(r // G < count, position, 2147483647))
            first = tl.maximum(first, tl.maximum(0, least - window + 1) // B)
        d, e, c = tl.arange(0, W), tl.arange(0, V), tl.arange(0, B)
        line = token.to(tl.int64) * H + head * SHARED + r % G
        query = tl.load(q + line[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        table = tables + tl.load(rows + begin) * M
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, V), tl.float32)
        for n in range(first, end):
            block = tl.load(table + n).to(tl.int64) * K + head
            key = tl.load(keys + (block * D + d[:, None]) * B + c[None, :], mask=(d < D)[:, None], other=0.0)
            score = tl.dot(query.to(key.dtype), key, input_precision=EXACT) * scale
            if cap > 0:
                score = cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
            place = n * B + c[None, :]
            seen = place <= position[:, None]
            if window > 0:
                seen = seen & (place > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight, fade = tl.exp(score - base[:, None]), tl.exp(top - base)
            known = (e < Dv)[None, :] & (n * B + c <= last)[:, None]
            value = tl.load(values + (block * B + c[:, None]) * E + e[None, :], mask=known, other=0.0)
            acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=EXACT)
            total = total * fade + tl.sum(weight, 1)
            top = higher
        written = there[:, None] & (e < Dv)[None, :]
        if WHOLE:
            acc = acc / total[:, None]
            tl.store(out + line[:, None] * Dv + e[None, :], acc.to(out.dtype.element_ty), mask=written)
        else:
            part = chunk.to(tl.int64) * T * H + line
            tl.store(out + part[:, None] * Dv + e[None, :], acc, mask=written)
            tl.store(tops + part, top, mask=there)
            tl.store(sums + part, total, mask=there)


@triton.jit
def _add_chunks(
    parts, tops, sums, positions, out, T, H, Dv, window, V: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t)
    e, n = tl.arange(0, V), tl.arange(0, CHUNKS)
    there = n <= position // SPAN
    if window > 0:
        there = there & ((n + 1) * SPAN > position - window + 1)
    line = n.to(tl.int64) * T * H + t * H + h
    top = tl.load(tops + line, mask=there, other=float("-inf"))
    factor = tl.exp(top - tl.max(top))
    total = tl.sum(tl.load(sums + line, mask=there, other=0.0) * factor)
    acc = tl.load(parts + line[:, None] * Dv + e[None, :], mask=there[:, None] & (e < Dv)[None, :], other=0.0)
    whole = tl.sum(acc * factor[:, None], 0) / total
    tl.store(out + (t * H + h) * Dv + e, whole.to(out.dtype.element_ty), mask=e < Dv)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, size: int, places: Any, scale: float, window: int,
    cap: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of queries `[T, H, D]`, each over its row's places up to its own: `[T, H, size]`.

    `places` says whose the tokens are and which go together, `window` how many places are seen (0: all), `cap` is the
    bound of a soft-capped score (0: none).
    """
    count, heads, dims = q.shape
    kinds = keys.shape[1]
    shared = heads // kinds
    together = triton.next_power_of_2(shared)
    rows = max(_LEAST, together * places.together)
    chunks = -(-places.tables.shape[1] * BLOCK // CHUNK)
    out = torch.empty((count, heads, size), dtype=q.dtype, device=q.device)
    parts, tops, sums = out, out, out
    if chunks > 1:
        parts = torch.empty((chunks, count, heads, size), dtype=torch.float32, device=q.device)
        tops, sums = torch.empty((2, chunks, count, heads), dtype=torch.float32, device=q.device)
    wide = triton.next_power_of_2(max(size, _LEAST))
    _attend[(len(places.begins), kinds, chunks)](
        q, keys, values, places.rows, places.positions, places.tables, places.begins, places.counts, parts, tops, sums,
        scale, window, cap, count, heads, kinds, dims, size, values.shape[3], places.tables.shape[1],
        shared, together, rows, triton.next_power_of_2(max(dims, _LEAST)), wide, BLOCK, CHUNK // BLOCK, chunks == 1,
        "ieee" if keys.dtype == torch.float32 else "tf32", num_warps=4 if rows >= _ROWS else 2,
    )  # fmt: skip
    if chunks > 1:
        _add_chunks[(count, heads)](
            parts, tops, sums, places.positions, out, count, heads, size, window, wide, CHUNK,
            triton.next_power_of_2(chunks), num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def _add_and_norm(x, update, weight, eps, out, C, W: tl.constexpr, ADD: tl.constexpr):
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    there = c < C
    number = _read(x + t * C + c, there)
    if ADD:
        number = (number + _read(update + t * C + c, there)).to(x.dtype.element_ty)
        tl.store(x + t * C + c, number, mask=there)
        number = number.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(number * number) / C + eps)
    scaled = (number * factor).to(out.dtype.element_ty).to(tl.float32) * _read(weight + c, there)
    tl.store(out + t * C + c, scaled.to(out.dtype.element_ty), mask=there)


def add_and_norm(x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds `update`, if any, to `x` `[T, C]` in place; returns the RMS norm of the sum (Zhang, Sennrich 2019)."""
    out, width = torch.empty_like(x), triton.next_power_of_2(x.shape[1])
    given = x if update is None else update
    _add_and_norm[(len(x),)](x, given, weight, eps, out, x.shape[1], width, update is not None, num_warps=4)
    return out


@triton.jit
def _silu_multiply(x, out, I, W: tl.constexpr):  # noqa: E741
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    gate = tl.load(x + t * 2 * I + i, mask=i < I, other=0.0)
    up = tl.load(x + (t * 2 + 1) * I + i, mask=i < I, other=0.0).to(tl.float32)
    number = gate.to(tl.float32)
    activated = (number / (1.0 + tl.exp(-number))).to(gate.dtype).to(tl.float32)
    tl.store(out + t * I + i, (activated * up).to(out.dtype.element_ty), mask=i < I)


def silu_multiply(x: torch.Tensor) -> torch.Tensor:
    """Of gate and up side by side, `[T, 2I]`, `silu(gate) · up`, `[T, I]` (SwiGLU: Shazeer 2020)."""
    width = x.shape[1] // 2
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    _silu_multiply[(len(x), triton.cdiv(width, _WIDE))](x, out, width, _WIDE, num_warps=4)
    return out


@triton.jit
def _shrink(x, adapters, has, a, hidden, I, x_step, R: tl.constexpr, W: tl.constexpr):  # noqa: E741
    t = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapters + t)
    if adapter >= 0:
        index = tl.load(has + adapter).to(tl.int64)
        if index >= 0:
            r, i = tl.arange(0, R), tl.arange(0, W)
            acc = tl.zeros((R, W), tl.float32)
            for begin in range(0, I, W):
                there = begin + i < I
                number = tl.load(x + t * x_step + begin + i, mask=there, other=0.0).to(tl.float32)
                factor = tl.load(a + (index * R + r[:, None]) * I + begin + i[None, :], mask=there[None, :], other=0.0)
                acc += factor * number[None, :]
            tl.store(hidden + t * R + r, tl.sum(acc, 1))


@triton.jit
def _expand(hidden, adapters, has, b, out, O, out_step, R: tl.constexpr, W: tl.constexpr):  # noqa: E741
    t = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapters + t)
    if adapter >= 0:
        index = tl.load(has + adapter).to(tl.int64)
        if index >= 0:
            r, o = tl.arange(0, R), tl.program_id(1) * W + tl.arange(0, W)
            factor = tl.load(b + (index * R + r[:, None]) * O + o[None, :], mask=(o < O)[None, :], other=0.0)
            delta = tl.sum(tl.load(hidden + t * R + r)[:, None] * factor, 0)
            before = tl.load(out + t * out_step + o, mask=o < O, other=0.0)
            tl.store(out + t * out_step + o, (before.to(tl.float32) + delta).to(before.dtype), mask=o < O)


def add_lora(
    x: torch.Tensor, adapters: torch.Tensor, has: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor
) -> None:
    """Add each token's own low-rank product: `out[t] += (a[i] @ x[t]) @ b[i]` with `i = has[adapters[t]]`; -1 in either
    adds nothing.

    `x` `[T, I]`, `a` `[n, r, I]` and `b` `[n, r, O]` float32, `out` `[T, O]`, in which rows may stand apart; r is a
    power of two.
    """
    rank = a.shape[1]
    hidden = torch.empty((len(x), rank), dtype=torch.float32, device=x.device)
    wide = max(32, min(256, 4096 // rank))
    _shrink[(len(x),)](x, adapters, has, a, hidden, x.shape[1], x.stride(0), rank, wide, num_warps=4)
    grid = (len(x), triton.cdiv(out.shape[1], wide))
    _expand[grid](hidden, adapters, has, b, out, out.shape[1], out.stride(0), rank, wide, num_warps=2)
