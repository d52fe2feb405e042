"""Memory of huge pages, for what every step of the engine reads from beginning to end: weights and the cache."""

import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np

_CHUNK = 64 << 20
_HUGE = 2 << 20
_ALIGNMENT = 64


class HugePages:
    """Gives out arrays of zeros side by side in large pieces of memory, which the kernel is asked to back with pages of
    2 MB: with pages of 4 KB the processor spends a third of a decoding step on looking up addresses.

    Pages that nobody wrote to take no memory. A piece is given back when the last array in it is gone.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array for one owner to write to."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._free):
            self._free = _piece(max(size, _CHUNK))
        array = self._free[:size].view(dtype).reshape(shape)
        self._free = self._free[size + (-size % _ALIGNMENT) :]
        return array


def _piece(size: int) -> np.ndarray:
    """Private zeros of at least `size` bytes that begin at a huge page."""
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: everything works, slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    return whole[-whole.ctypes.data % _HUGE :]
