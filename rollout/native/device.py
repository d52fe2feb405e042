"""The engine's forward on a GPU: two shapes that never change, each one graph of kernels that is launched whole.

Newest tokens of running rows make one forward of as many rows as there are slots, pieces of prompts another; what is
missing is filled up with idle tokens. So a product always has the same number of rows, which decides what kernel
computes it, and a step costs one launch instead of hundreds. Up to some 300 tokens a forward takes as long as reading
the weights does, so idle rows are free.

Shapes: T tokens of a forward, S slots, V tokens of the vocabulary, M blocks a row can have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .cache import Batch

PROMPT_TOKENS = 512
"""Prompt tokens of a forward."""


@dataclass(frozen=True, slots=True)
class Places:
    """Whose the tokens of a forward are, in the device's memory, at addresses that stay; int32.

    Tile i of the attention is the `counts[i]` tokens from `begins[i]` on, neighbours in one row; at most `together`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    adapters: torch.Tensor
    wanted: torch.Tensor
    begins: torch.Tensor
    counts: torch.Tensor
    tables: torch.Tensor
    together: int


Forward = Callable[[Places, bool], torch.Tensor]
"""The logits `[wanted, V]` of places, with adapters or without."""


class Shape:
    """A forward of `size` tokens, of which the logits of `wanted` come out.

    Its graph is captured at the first call, one with adapters and one without; where a model's forward cannot be, its
    kernels are launched one by one.
    """

    def __init__(
        self, forward: Forward, size: int, wanted: int, together: int, rows: int, blocks: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._forward, self._together = forward, together
        tiles = size if together == 1 else -(-size // together) + wanted
        sizes = {"tokens": size, "positions": size, "rows": size, "adapters": size, "wanted": wanted}
        sizes |= {"begins": tiles, "counts": tiles, "tables": rows * blocks}
        pinned = device.type == "cuda"
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        self._parts = dict(zip(sizes, np.split(self._host.numpy(), np.cumsum(list(sizes.values()))[:-1]), strict=True))
        there: dict[str, Any] = dict(zip(sizes, self._device.split(list(sizes.values())), strict=True))
        there["tables"] = there["tables"].view(rows, blocks)
        self._places = Places(**there, together=together)
        self._graphs: dict[int | None, tuple[Any, torch.Tensor]] = {}
        """By the layout of the adapters' memory that they read, None without adapters."""
        self._captures = pinned
        self._arrived = torch.cuda.Event() if pinned else None

    def __call__(self, batch: Batch, wanted: np.ndarray, idle_block: int, layout: int) -> torch.Tensor:
        """Logits `[len(wanted), V]` after the tokens at these places, good until the next call.

        `layout` counts how often the adapters' memory was laid out anew.
        """
        if self._arrived:
            self._arrived.synchronize()  # before the memory that the last copy reads is written to
        self._fill(batch, wanted, idle_block)
        self._device.copy_(self._host, non_blocking=True)
        if self._arrived:
            self._arrived.record()
        return self._run(layout if (batch.adapters >= 0).any() else None)[: len(wanted)]

    def _fill(self, batch: Batch, wanted: np.ndarray, idle_block: int) -> None:
        count, parts = len(batch.tokens), self._parts
        for name, idle in (("tokens", 0), ("positions", 0), ("rows", len(batch.tables)), ("adapters", -1)):
            parts[name][:count] = getattr(batch, name)
            parts[name][count:] = idle
        parts["wanted"][: len(wanted)], parts["wanted"][len(wanted) :] = wanted, 0
        tables = parts["tables"].reshape(len(batch.tables) + 1, -1)
        tables[:-1], tables[-1] = batch.tables, idle_block
        begins, counts = _tiles(batch, self._together)
        parts["begins"][: len(begins)] = begins
        parts["counts"][: len(begins)], parts["counts"][len(begins) :] = counts, 0

    def _run(self, layout: int | None) -> torch.Tensor:
        if layout not in self._graphs:
            out = self._forward(self._places, layout is not None)  # compiles what is to be captured
            if self._captures:
                self._capture(layout)
            return out
        graph, out = self._graphs[layout]
        graph.replay()
        return out

    def _capture(self, layout: int | None) -> None:
        if layout is not None:  # what the older ones with adapters read is gone
            self._graphs = {key: graph for key, graph in self._graphs.items() if key is None}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = self._forward(self._places, layout is not None)
        except RuntimeError:  # it asks the device for a number on its way
            self._captures = False
            return
        self._graphs[layout] = graph, out


class DeviceForward:
    """Both shapes, for a model of which `shared` query heads have one key head."""

    def __init__(self, forward: Forward, slots: int, blocks_per_row: int, shared: int, device: torch.device) -> None:
        from .device_kernels import tokens_of_a_tile

        slots += -slots % 8
        rest = (slots + 1, blocks_per_row, device)
        self._newest = Shape(forward, slots, slots, 1, *rest)
        self._pieces = Shape(forward, PROMPT_TOKENS, slots, tokens_of_a_tile(shared), *rest)
        self._slots = slots

    def __call__(self, batch: Batch, wanted: Sequence[int], newest: int, idle_block: int, layout: int) -> torch.Tensor:
        """Logits `[len(wanted), V]`; the first `newest` tokens, all wanted, are the newest of running rows."""
        batch = _with_tables(batch, self._slots)
        places = np.asarray(wanted, np.int64)
        parts: list[torch.Tensor] = []
        if newest:
            parts.append(self._newest(_part(batch, 0, newest), places[:newest], idle_block, layout))
        if newest < len(batch.tokens):
            pieces = _part(batch, newest, len(batch.tokens))
            parts.append(
                self._pieces(pieces, places[newest:] - newest, idle_block, layout).clone()
            )  # kept while others are computed
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _part(batch: Batch, begin: int, end: int) -> Batch:
    some = slice(begin, end)
    return Batch(batch.tokens[some], batch.positions[some], batch.rows[some], batch.tables, batch.adapters[some])


def _with_tables(batch: Batch, rows: int) -> Batch:
    """The batch with as many tables as there may be rows."""
    missing = rows - len(batch.tables)
    tables = np.pad(batch.tables, ((0, missing), (0, 0))) if missing else batch.tables
    return Batch(batch.tokens, batch.positions, batch.rows, tables, batch.adapters)


def _tiles(batch: Batch, together: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles of up to `together` tokens begin that follow one another in a row, and how many they are."""
    count = len(batch.tokens)
    if together == 1:
        return np.arange(count), np.ones(count, np.int64)
    breaks = (np.diff(batch.rows) != 0) | (np.diff(batch.positions) != 1)
    edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [count]])
    begins = np.concatenate([np.arange(a, b, together) for a, b in pairwise(edges)])
    return begins, np.diff(np.concatenate([begins, [count]]))
