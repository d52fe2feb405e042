"""A Ray of two nodes on this machine in which another node comes for one that is gone: `python -m benchmarks.nodes`.

It lives in a process of its own, which prints its address and ends with its standard input, so that whatever else this
process starts and adopts is told apart from the nodes.
"""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HEAD_CPUS = 4
"""Room for policy, reference, critic, reward and one rollout worker."""
_LOOK_SECONDS = 0.2
_QUICKLY = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
"""A suspended node counts as dead after two seconds or so, not after a minute."""


@contextmanager
def two_nodes() -> Iterator[str]:
    """Its address; the head takes a run's roles and one rollout worker, the other node one more."""
    command = [sys.executable, "-m", "benchmarks.nodes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()


def main() -> None:
    """Keep two nodes until standard input ends."""
    from ray.cluster_utils import Cluster
    from raylign.cluster.processes import adopt_orphans, descendants, end
    from raylign.cluster.session import loopback_host

    adopt_orphans()
    hosts = ({"node_ip_address": loopback_host(number)} for number in itertools.count(2))
    head = {"num_cpus": HEAD_CPUS, "include_dashboard": False, "_system_config": _QUICKLY}
    cluster = Cluster(initialize_head=True, head_node_args=head | next(hosts))
    over = threading.Event()

    def keep_one_more() -> None:
        raylet = _join(cluster, next(hosts))
        print(cluster.address, flush=True)
        while not over.wait(_LOOK_SECONDS):
            if not _works(raylet):
                raylet = _join(cluster, next(hosts))

    keeper = threading.Thread(target=keep_one_more)
    keeper.start()
    sys.stdin.read()
    over.set()
    keeper.join()
    end(descendants, grace=0)


def _join(cluster: object, host: dict[str, str]) -> int:
    """Add a node; the id of its raylet."""
    from .saboteur import processes_of_node

    cluster.add_node(num_cpus=1, **host)  # pyright: ignore[reportAttributeAccessIssue]
    return processes_of_node(host["node_ip_address"])[0]


def _works(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
