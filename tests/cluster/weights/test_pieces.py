"""Tensors as pieces: where each is cut, what comes back, and that the digest does not see the cuts."""

import pickle

import numpy as np
import pytest
from raylign.cluster.weights import joined, pieces, tensors_digest, tensors_of, version_digest

TENSORS = {
    "large": np.arange(1 << 18, dtype=np.float32).reshape(1 << 10, 1 << 8),  # a megabyte: alone
    "b/odd": np.arange(7, dtype=np.int8),
    "b/none": np.zeros((0, 3), np.float32),
    "a": np.array(2.5, np.float64),
    "z": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
}


def test_small_tensors_are_joined_and_large_ones_are_views() -> None:
    first, second, third = joined(TENSORS)
    assert [[name for name, _, _ in piece.layout] for piece in (first, second, third)] == [
        ["a", "b/none", "b/odd"],
        ["large"],
        ["z"],
    ]
    assert first.data.tobytes() == np.float64(2.5).tobytes().ljust(64, b"\0") + bytes(range(7)).ljust(64, b"\0")
    assert np.shares_memory(second.data, TENSORS["large"])
    assert np.frombuffer(third.data.tobytes(), np.float32, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_what_was_joined_comes_back() -> None:
    got = tensors_of(pickle.loads(pickle.dumps(joined(TENSORS))))
    assert list(got) == sorted(TENSORS)
    for name, array in TENSORS.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(got[name], array)


def test_the_digest_does_not_depend_on_where_the_bytes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {f"{i:02}": np.full(100, i, np.float32) for i in range(9)}
    whole = joined(rows)
    digest = version_digest(whole, {}, "base")
    assert digest == tensors_digest(dict(reversed(rows.items())))
    for limit, count in ((448, 9), (1000, 5), (4096, 1)):
        monkeypatch.setattr(pieces, "JOINED_BYTES", limit)
        cut = joined(rows)
        assert len(cut) == count
        assert version_digest(cut, {}, "base") == digest
