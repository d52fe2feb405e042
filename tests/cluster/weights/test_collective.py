"""Weights by broadcast, over gloo on real processes: who gets them, and what a death means."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed
from raylign.cluster.weights import Collective, Parcel, Tensors, joined, tensors_of


def tensors(seed: int) -> Tensors:
    """Two pieces and buckets' worth of two dtypes; the first tensor is larger than a bucket."""
    random = np.random.default_rng(seed)
    return {
        "a": random.random((65, 1 << 18), np.float32),
        "b": random.integers(0, 9, (5, 3)).astype(np.int64),
        "c": random.random((1000,), np.float32),
    }


class End:
    """A process at one end of the transport."""

    def __init__(self, regroup: bool = True, backend: Literal["gloo", "nccl"] = "gloo") -> None:
        self.transport = Collective(backend, regroup=regroup, timeout=250, meet=100)

    def send(self, seed: int, receivers: tuple[str, ...]) -> Parcel:
        """Send the tensors of a seed."""
        return self.transport.send(joined(tensors(seed)), receivers)

    def receive(self, parcel: Parcel, name: str, seed: int) -> bool:
        """Whether what arrives are the tensors of a seed."""
        got, wanted = tensors_of(self.transport.receive(parcel, name, timeout=60)), tensors(seed)
        assert list(got) == list(wanted)
        return all(got[k].dtype == w.dtype and np.array_equal(got[k], w) for k, w in wanted.items())


@pytest.fixture
def ends(ray_session: str) -> Iterator[list[Any]]:
    """A policy and three workers, in processes of their own."""
    import ray

    actors = [ray.remote(End).options(num_cpus=0).remote() for _ in range(4)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def without_store(parcel: Parcel) -> Parcel:
    """The same version for those that get it by broadcast alone."""
    return replace(parcel, buckets=())


def everyone(workers: list[Any], parcel: Parcel, seed: int) -> bool:
    """Whether all these workers, `w0` the first, get the tensors of a seed."""
    import ray

    return all(ray.get([worker.receive.remote(parcel, f"w{i}", seed) for i, worker in enumerate(workers)]))


def test_a_fleet_gets_a_version_by_broadcast_and_survives_a_death(ends: list[Any]) -> None:
    import ray

    policy, *workers = ends
    names = ("w0", "w1", "w2")
    first = ray.get(policy.send.remote(1, names[:2]))
    assert [len(layout) for layout in first.layouts] == [1, 2]
    assert not first.note
    assert everyone(workers[:2], without_store(first), 1)
    assert ray.get(workers[2].receive.remote(first, "w2", 1))  # no member: it came later

    second = ray.get(policy.send.remote(2, names[:2]))
    assert second.channel == first.channel
    assert everyone(workers[:2], without_store(second), 2)

    third = ray.get(policy.send.remote(3, names))
    assert third.channel is not None
    assert third.channel.members == names
    assert third.note.endswith("workers joined")
    assert everyone(workers, without_store(third), 3)

    ray.kill(workers[2])
    began = time.monotonic()
    fourth = ray.get(policy.send.remote(4, names))  # nobody knows of the death yet
    assert fourth.channel == third.channel
    assert everyone(workers[:2], fourth, 4)
    assert time.monotonic() - began < 100  # a closed connection, not a time-out

    fifth = ray.get(policy.send.remote(5, names[:2]))
    assert "the gloo group of w0, w1, w2 ended" in fifth.note
    assert everyone(workers[:2], without_store(fifth), 5)


def test_a_lost_group_ends_the_run_where_the_recipe_says_so(ray_session: str) -> None:
    import ray

    policy, worker, other = (ray.remote(End).options(num_cpus=0).remote(regroup=False) for _ in range(3))
    first = ray.get(policy.send.remote(1, ("w0", "w1")))
    assert everyone([worker, other], without_store(first), 1)
    ray.kill(other)
    with pytest.raises(RunFailed, match=r"the gloo group of w0, w1 ended: w1 left it; .*on_loss is fail"):
        ray.get(policy.send.remote(2, ("w0",)))
    ray.kill(policy)
    ray.kill(worker)


@pytest.mark.gpu
def test_a_fleet_gets_a_version_over_nccl(ray_session: str) -> None:
    import ray
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs a GPU for each process: this machine has {torch.cuda.device_count()}, not 2")
    policy, worker = (ray.remote(End).options(num_cpus=0, num_gpus=1).remote(backend="nccl") for _ in range(2))
    for version in (1, 2):
        parcel = ray.get(policy.send.remote(version, ("w0",)))
        assert everyone([worker], without_store(parcel), version)
    ray.kill(policy)
    ray.kill(worker)
