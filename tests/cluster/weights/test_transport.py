"""Buckets are cut by size; what comes out of the object store is what went in, and cannot be changed."""

import time

import numpy as np
import pytest
from raylign.cluster.weights import ObjectStore, Piece, joined, tensors_of
from raylign.cluster.weights.transport import in_buckets


def test_buckets_are_cut_by_size_in_their_order() -> None:
    sizes = {"a": 3, "b": 5, "c": 1, "d": 20, "e": 0, "f": 8}
    pieces = [Piece(((name, "uint8", (size,)),), np.zeros(size, np.uint8)) for name, size in sizes.items()]
    cut = in_buckets(pieces, limit=8)
    assert [[piece.layout[0][0] for piece in bucket] for bucket in cut] == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert in_buckets([]) == []


def test_a_parcel_is_a_snapshot_that_nobody_can_write(ray_session: str) -> None:
    tensors = {"a": np.arange(30 << 20, dtype=np.float32), "b": np.arange(3, dtype=np.int64), "c": np.ones((), np.int8)}
    parcel = ObjectStore().send(joined(tensors))
    assert len(parcel.buckets) == 2
    tensors["a"][:] = 0  # the policy goes on learning
    got = tensors_of(ObjectStore().receive(parcel, "w", timeout=30))
    assert [(k, v.dtype, v.shape) for k, v in got.items()] == [(k, v.dtype, v.shape) for k, v in tensors.items()]
    assert np.array_equal(got["a"], np.arange(30 << 20, dtype=np.float32))
    with pytest.raises(ValueError, match="read-only"):
        got["a"][0] = 1


def test_a_version_that_nobody_refers_to_takes_no_memory(ray_session: str) -> None:
    import ray
    from ray._private.internal_api import node_stats

    def used() -> int:
        node = ray.nodes()[0]
        return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used

    before, size = used(), 16 << 20
    for version in range(4):
        parcel = ObjectStore().send(joined({"a": np.full(size, version, np.uint8)}))  # the one before is forgotten
        assert ObjectStore().receive(parcel, "w", timeout=30)[0].data[-1] == version
    assert used() >= size
    give_up = time.monotonic() + 60
    while used() > before + size + (1 << 20):
        assert time.monotonic() < give_up
    assert ObjectStore().receive(parcel, "w", timeout=30)[0].data[0] == 3
