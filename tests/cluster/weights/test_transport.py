"""Buckets are cut by size; what comes out of the object store is what went in, and cannot be changed."""

import numpy as np
import pytest
from raylign.cluster.weights import ObjectStore
from raylign.cluster.weights.transport import in_buckets


def test_buckets_are_cut_by_size_in_the_order_of_names() -> None:
    sizes = {"a": 3, "b": 5, "c": 1, "d": 20, "e": 0, "f": 8}
    tensors = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    assert in_buckets(tensors, limit=8) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert in_buckets({"z": np.zeros(0, np.float32)}, limit=8) == [["z"]]
    assert in_buckets({}) == []


def test_a_parcel_is_a_snapshot_that_nobody_can_write(ray_session: str) -> None:
    tensors = {"a": np.arange(30 << 20, dtype=np.float32), "b": np.arange(3, dtype=np.int64), "c": np.ones((), np.int8)}
    parcel = ObjectStore().send(tensors)
    assert len(parcel.buckets) == 2
    tensors["a"][:] = 0  # the policy goes on learning
    got = ObjectStore().receive(parcel, "w", timeout=30)
    assert [(k, v.dtype, v.shape) for k, v in got.items()] == [(k, v.dtype, v.shape) for k, v in tensors.items()]
    assert np.array_equal(got["a"], np.arange(30 << 20, dtype=np.float32))
    with pytest.raises(ValueError, match="read-only"):
        got["a"][0] = 1
