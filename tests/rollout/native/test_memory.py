"""Memory of huge pages: arrays side by side that are given back with their last user."""

import gc

import numpy as np
from raylign.rollout.native.memory import HugePages


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_arrays_are_zeros_of_their_own():
    memory = HugePages()
    arrays = [memory.zeros((3, 5), np.float32), memory.zeros((7,), np.uint16), memory.zeros((2, 2), np.uint32)]
    assert [a.shape for a in arrays] == [(3, 5), (7,), (2, 2)]
    assert not any(a.any() for a in arrays)
    assert all(a.ctypes.data % 64 == 0 for a in arrays)
    arrays[1][:] = 9
    assert not arrays[0].any()
    assert not arrays[2].any()


def test_a_piece_larger_than_usual_begins_at_a_huge_page_and_goes_with_its_array():
    memory = HugePages()
    before = resident()
    array = memory.zeros((200 << 20,), np.uint8)
    assert array.ctypes.data % (2 << 20) == 0
    array[:] = 1
    assert resident() - before > 190 << 20
    del array, memory
    gc.collect()
    assert resident() - before < 50 << 20
