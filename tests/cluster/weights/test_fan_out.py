"""Full weights to workers on three nodes: each node gets one copy, which its workers share.

The cluster lives in a process of its own (this file as a script), so that the Ray of the other tests is left alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MB = 1 << 20
WORKERS = [(node, k) for node in range(3) for k in range(2)]
"""Node and number of each worker; the weights are put on node 0."""


@pytest.mark.multinode
def test_a_node_pulls_each_bucket_once_and_its_workers_share_it() -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).resolve())], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["buckets"] == 3
    assert all(seen["equal"])
    for node, before, first, second in zip(range(3), *seen["stores"], strict=True):
        pulled = 0 if node == 0 else 3
        assert first["objects"] - before["objects"] == pulled
        assert first["bytes"] - before["bytes"] == pytest.approx(pulled * 40 * MB, rel=0.01)
        assert second == first  # the node's second worker found it there
    assert max(seen["own_bytes"]) < 60 * MB  # of the 120 that each of them reads


# ---- what runs in the process of its own


class Reader:
    """A worker that holds what it received."""

    def __init__(self) -> None:
        from raylign.cluster.weights import ObjectStore

        self._transport, self._held = ObjectStore(), {}

    def receive(self, parcel: Any, digest: str) -> tuple[bool, int]:
        """Whether these are the weights of a digest, and how much memory of its own the worker has more than before."""
        import psutil
        from raylign.cluster.weights import tensors_digest, tensors_of

        before = psutil.Process().memory_full_info().uss
        self._held = tensors_of(self._transport.receive(parcel, "reader", timeout=60))
        return tensors_digest(self._held) == digest, psutil.Process().memory_full_info().uss - before


def stores() -> list[dict[str, int]]:
    """Per node, how many objects its store has taken in so far and how many bytes it holds."""
    import ray
    from ray._private.internal_api import node_stats

    found = {}
    for node in ray.nodes():
        number = next(name for name in node["Resources"] if name in ("n0", "n1", "n2"))
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
        found[number] = {"objects": stats.cumulative_created_objects, "bytes": stats.object_store_bytes_used}
    return [found[f"n{i}"] for i in range(3)]


def scenario() -> dict[str, Any]:
    """The first worker of every node gets the weights, all at once; then the second."""
    import numpy as np
    import ray
    from ray.cluster_utils import Cluster
    from raylign.cluster.session import loopback_host
    from raylign.cluster.weights import ObjectStore, joined, tensors_digest

    hosts = [{"node_ip_address": host} if (host := loopback_host(n)) else {} for n in (2, 3, 4)]
    nodes = [{"num_cpus": 1, "resources": {f"n{i}": 2}, "object_store_memory": 300 * MB} | hosts[i] for i in range(3)]
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | nodes[0])
    try:
        for node in nodes[1:]:
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, **{f"_{key}": host for key, host in hosts[0].items()})
        tensors = {f"t{i}": np.full(10 * MB, i, np.float32) for i in range(3)}
        readers = {w: ray.remote(Reader).options(num_cpus=0, resources={f"n{w[0]}": 1}).remote() for w in WORKERS}
        ray.get([reader.__ray_ready__.remote() for reader in readers.values()])
        parcel, digest = ObjectStore().send(joined(tensors)), tensors_digest(tensors)
        taken, got = [stores()], []
        for k in range(2):
            got += ray.get([readers[node, k].receive.remote(parcel, digest) for node in range(3)], timeout=90)
            taken.append(stores())
        equal, own = zip(*got, strict=True)
        return {"buckets": len(parcel.buckets), "equal": equal, "own_bytes": own, "stores": taken}
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(scenario()))
