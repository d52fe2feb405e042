"""Tensors as a few large pieces of bytes, which are hashed, copied and moved at the memory's speed.

A model or adapter has many small tensors, and each costs a call wherever they are handled one by one: BLAKE3 hashes
pieces of 43 KB at 2.5 GB/s and pieces of a megabyte at 6 GB/s, measured on one core.

In the order of their names, every tensor begins at a multiple of 64 bytes and the gaps are zeros: the same tensors are
the same stream of bytes, wherever it is cut into pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

Tensors = dict[str, np.ndarray]

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype (numpy's short form, such as `<f4`) and shape."""

ALIGNMENT = 64
"""Bytes, a line of the processor's cache: what numpy and torch like a tensor to begin at."""

ALONE_BYTES = 1 << 20
"""From here on a tensor is a piece of its own, a view; smaller ones are copied together."""

JOINED_BYTES = 8 << 20
"""Of a piece of several tensors, at most."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tensors and their bytes, one after the other. Pickles without a copy of the bytes."""

    layout: tuple[Entry, ...]
    data: np.ndarray
    """`[bytes]` uint8."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors by name, as views."""
        begin = 0
        for name, dtype, shape in self.layout:
            size = _size(dtype, shape)
            yield name, self.data[begin : begin + size].view(dtype).reshape(shape)
            begin += _padded(size)


def joined(tensors: Tensors) -> list[Piece]:
    """The pieces of some tensors. A large tensor's piece is a view of it, so it changes when the tensor does."""
    return [_piece(names, tensors) for names in _runs(tensors)]


def tensors_of(pieces: Iterable[Piece]) -> Tensors:
    """What was joined, as views, in the order of the names."""
    return {name: array for piece in pieces for name, array in piece.tensors()}


def piece_bytes(layout: Iterable[Entry]) -> int:
    """How many bytes a piece of this layout has."""
    return sum(_padded(_size(dtype, shape)) for _, dtype, shape in layout)


def _runs(tensors: Tensors) -> Iterator[list[str]]:
    """Names in order, cut into those of each piece."""
    run: list[str] = []
    filled, was_alone = 0, False
    for name in sorted(tensors):
        size = _padded(tensors[name].nbytes)
        alone = size >= ALONE_BYTES
        if run and (alone or was_alone or filled + size > JOINED_BYTES):
            yield run
            run, filled = [], 0
        run.append(name)
        filled, was_alone = filled + size, alone
    if run:
        yield run


def _piece(names: list[str], tensors: Tensors) -> Piece:
    arrays = [tensors[name] for name in names]
    layout = tuple((name, array.dtype.str, array.shape) for name, array in zip(names, arrays, strict=True))
    parts: list[np.ndarray] = []
    for array in arrays:
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        if gap := -array.nbytes % ALIGNMENT:
            parts.append(np.zeros(gap, np.uint8))
    return Piece(layout, parts[0] if len(parts) == 1 else np.concatenate(parts))


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * prod(shape)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
