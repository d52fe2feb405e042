"""The physical limit of generation on a CPU: the matrix products of the model's own shapes, and nothing else."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .models import TORCH_NAMES, Dtype, Shape
from .workloads import Workload

_SECONDS_A_SHAPE = 0.02
_LEAST_REPEATS = 4


def _products(rows: int, matrix: tuple[int, int], dtype: Dtype) -> list[Callable[[], Any]]:
    """The ways there are of multiplying `rows` by a matrix: torch's as stored, oneDNN's packed where that exists, and
    the native engine's."""
    import torch
    from raylign.rollout.native import matmul  # pyright: ignore[reportMissingImports]
    from raylign.rollout.native.kernels import as_array  # pyright: ignore[reportMissingImports]
    from torch.nn import functional

    outputs, inputs = matrix
    kind = getattr(torch, TORCH_NAMES[dtype])
    x, weight = torch.randn(rows, inputs, dtype=kind), torch.randn(outputs, inputs, dtype=kind)
    ways: list[Callable[[], Any]] = [lambda: functional.linear(x, weight)]
    if torch.backends.mkldnn.is_available():
        ops: Any = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, rows)
        ways.append(lambda: ops._linear_pointwise(x, packed, None, "none", [], ""))
    pairs = dtype == "bf16"
    panels = np.zeros(matmul.panels(outputs, inputs, pairs), np.uint32 if pairs else np.float32)
    matmul.pack(as_array(weight), panels)
    start, out = np.zeros(len(panels) * matmul.PANEL, np.float32), np.empty((rows, outputs), np.float32)
    given = as_array(x).view(panels.dtype)
    ways.append(lambda: matmul.Products()(given, panels, start, out))
    return ways


def product_seconds(rows: int, matrix: tuple[int, int], dtype: Dtype) -> float:
    """The least time one product `[rows, I] x [I, O]` takes, over all ways and repeats, with torch's threads as set."""
    import torch

    best = float("inf")
    with torch.inference_mode():
        for way in _products(rows, matrix, dtype):
            way()
            until, repeats = time.perf_counter() + _SECONDS_A_SHAPE, 0
            while repeats < _LEAST_REPEATS or time.perf_counter() < until:
                start = time.perf_counter()
                way()
                best = min(best, time.perf_counter() - start)
                repeats += 1
    return best


def layers_seconds(rows: int, shape: Shape, dtype: Dtype) -> float:
    """The products of all layers for `rows` tokens."""
    seconds = {matrix: product_seconds(rows, matrix, dtype) for matrix in set(shape.matrices)}
    return shape.layers * sum(seconds[matrix] for matrix in shape.matrices)


def tokens_per_second(shape: Shape, work: Workload, dtype: Dtype, rows: int) -> float:
    """Useful tokens per second when every product runs alone at full speed, decoding `rows` tokens at a time.

    A completion's first token comes from its prompt's forward; every token needs the output layer once.
    """
    decode = layers_seconds(rows, shape, dtype) / rows
    together = max(work.prompt, rows)
    prefill = layers_seconds(together, shape, dtype) / together
    head = product_seconds(rows, shape.head, dtype) / rows
    seconds = (
        decode * (work.useful - len(work.lengths)) + head * work.useful + prefill * work.prompts_computed * work.prompt
    )
    return work.useful / seconds
