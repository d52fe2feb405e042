"""A Ray of two nodes on this machine in which another node comes for one that is gone: `python -m benchmarks.nodes`.

It lives in a process of its own, which prints its address and ends with its standard input, so that whatever else this
process starts and adopts is told apart from the nodes.
"""

import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .harm import processes_of_node

ROOM = tuple(f"stages.0.{role}.cpus=2" for role in ("policy", "reference", "critic.resources", "scoring.resources"))
"""What a recipe is to ask for, so that the head has room for all but one of two rollout workers, and the other node for
that one alone."""
_HEAD_CPUS = 2 * (len(ROOM) + 1) + 1
"""The policy has two ranks."""
_LOOK_SECONDS = 0.2
_SOON = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}
"""A suspended node counts as dead after a quarter of a minute, not after one; a busy one still answers."""


@contextmanager
def two_nodes() -> Iterator[str]:
    """Its address."""
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
    from raylign.cluster.auth import ask_for_token
    from raylign.cluster.processes import adopt_orphans, descendants, end

    adopt_orphans()
    ask_for_token(make=True)
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = (_arguments(Path(folder), number) for number in itertools.count(2))
        head = {"num_cpus": _HEAD_CPUS, "include_dashboard": False, "_system_config": _SOON}
        cluster = Cluster(initialize_head=True, head_node_args=head | next(nodes), shutdown_at_exit=False)

        def join() -> int:
            node = next(nodes)
            cluster.add_node(num_cpus=1, **node)
            return processes_of_node(node["node_ip_address"])[0]

        def replace(raylet: int) -> None:
            while not over.wait(_LOOK_SECONDS):
                raylet = raylet if _works(raylet) else join()

        raylet = join()
        print(cluster.address, file=sys.__stdout__, flush=True)
        keeper = threading.Thread(target=replace, args=(raylet,))
        keeper.start()
        sys.stdin.read()
        over.set()
        keeper.join()
        end(descendants, grace=0)


def _arguments(folder: Path, number: int) -> dict[str, str]:
    """Where a node lives. With a folder of its own it leaves alone what tells a driver that the head is its node."""
    from raylign.cluster.session import loopback_host

    host = loopback_host(number)
    assert host, "nodes that share an address cannot be told apart"
    (folder / str(number)).mkdir()
    return {"node_ip_address": host, "temp_dir": str(folder / str(number))}


def _works(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
