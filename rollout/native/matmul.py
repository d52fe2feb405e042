"""Matrix products of tokens and weights on a CPU: a token's bits are its own, in any company and for any number of
threads, because every output is one sum in the order of the inputs.

Weights lie in panels of a few outputs, input by input, so that one product reads them once from beginning to end, at
the speed of the memory.

Shapes: T tokens, I inputs (in 32-bit units: half as many for bfloat16, which comes in pairs), O outputs, P panels.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from .compiled import compiled
from .tiles import HEIGHTS, PANEL, height_of, multiply_tile

_SPLIT = 1 << 22
"""Multiplications below which a product is not worth a second thread."""


def panels(outputs: int, inputs: int, pairs: bool) -> tuple[int, int, int]:
    """The shape of packed weights. `inputs` must be even for pairs."""
    return -(-outputs // PANEL), inputs // 2 if pairs else inputs, PANEL


def pack(weight: np.ndarray, out: np.ndarray) -> None:
    """Lay out weights `[O, I]` of float32 or bfloat16 (as uint16) in `out` `[P, I, PANEL]`, float32 or pairs (uint32).

    Places of the last panel that have no output are left as they are.
    """
    _pack(weight if weight.dtype == np.float32 else weight.view(np.uint32), out)


class Products:
    """Multiplies on up to `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "matmul") if threads > 1 else None

    def __call__(self, x: np.ndarray, packed: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
        """`out = x @ packed + bias`: x `[T, I]` of packed's type, bias `[P · PANEL]`, out `[T, O]` float32."""
        if self._pool is None or len(x) * packed.size < _SPLIT:
            _multiply(x, packed, bias, out, 0, len(packed))
            return
        cuts = [len(packed) * i // self._threads for i in range(self._threads + 1)]
        parts = list(pairwise(cuts))
        others = [self._pool.submit(_multiply, x, packed, bias, out, *part) for part in parts[1:]]
        _multiply(x, packed, bias, out, *parts[0])
        for other in others:
            other.result()


@compiled()
def _pack(weight: Any, out: Any) -> None:
    for p in range(out.shape[0]):
        outputs = min(PANEL, weight.shape[0] - p * PANEL)
        for i in range(out.shape[1]):
            for o in range(outputs):
                out[p, i, o] = weight[p * PANEL + o, i]


@compiled()
def _multiply(x: Any, packed: Any, bias: Any, out: Any, begin: int, end: int) -> None:
    """The panels `begin` … `end - 1` of a product, each for all tokens before the next: weights come from far away."""
    x_step, panel_step, out_step = x.shape[1] * 4, packed.shape[1] * PANEL * 4, out.shape[1] * 4
    edge = np.empty((HEIGHTS[0], PANEL), np.float32)
    for p in range(begin, end):
        first = p * PANEL
        outputs = min(PANEL, out.shape[1] - first)
        t = 0
        while t < x.shape[0]:
            height, source = height_of(x.shape[0] - t), x.ctypes.data + t * x_step
            panel, start = packed.ctypes.data + p * panel_step, bias.ctypes.data + first * 4
            to, step = out.ctypes.data + t * out_step + first * 4, out_step
            if outputs < PANEL:
                to, step = edge.ctypes.data, PANEL * 4
            multiply_tile(packed, height, source, x_step, panel, PANEL * 4, packed.shape[1], start, 0, to, step)  # pyright: ignore[reportCallIssue]
            if outputs < PANEL:
                out[t : t + height, first:] = edge[:height, :outputs]
            t += height
