"""Several hosts on this machine: network namespaces, each with an address and a Ray node of its own, on one switch.

Processes of two hosts reach each other by their addresses alone, at the bandwidth of their links, and a link can be
cut. They share the file system, as hosts with a common storage do. Needs root and Linux.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

_NET = "10.99.7"
_PORT = 6379
_HEAD = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]


def unavailable() -> str:
    """Why there can be no hosts here, or an empty text."""
    if os.getuid() != 0 or not shutil.which("ip"):
        return "needs root and iproute2 to make network namespaces"
    name = f"rl{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return "" if made.returncode == 0 else f"network namespaces cannot be made here: {made.stderr.strip()}"


class Hosts:
    """A switch and its hosts; host 0 is the head. `down` ends every process in them and takes them away."""

    def __init__(self, folder: Path, count: int, *, rate: str = "500mbit") -> None:
        """`rate` is what each host's link carries each way, as `tc` writes it."""
        self._folder, self._count = folder, count
        self._prefix = f"rl{os.getpid()}"
        self._switch = f"{self._prefix}sw"
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "addr", "add", f"{_NET}.254/24", "dev", "br0")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for number in range(count):
            self._plug_in(number, rate)

    def _plug_in(self, number: int, rate: str) -> None:
        host = self._host(number)
        _ip("netns", "add", host)
        _ip("-n", self._switch, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("-n", self._switch, "link", "set", f"v{number}", "master", "br0", "up")
        _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", host, "link", "set", "eth0", "up")
        _ip("-n", host, "route", "add", "default", "via", f"{_NET}.254")
        for namespace, device in ((host, "eth0"), (self._switch, f"v{number}")):
            shape = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", rate]
            _run([*shape, "burst", "256kb", "latency", "50ms"])

    def _host(self, number: int) -> str:
        return f"{self._prefix}h{number}"

    def address(self, number: int) -> str:
        return f"{_NET}.{number + 1}"

    @property
    def control_store(self) -> str:
        """The address that drivers and nodes join."""
        return f"{self.address(0)}:{_PORT}"

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """A command as it runs on a host."""
        return ["ip", "netns", "exec", self._host(number), *command]

    def start_node(self, number: int, cpus: int, labels: str = "") -> None:
        """`ray start` on a host, the head's or one that joins it; `labels` are such as `disk=ssd`."""
        which = ["--address", self.control_store] if number else _HEAD
        self._start(number, cpus, [*which, *(["--labels", labels] if labels else [])])

    def start_autoscaling_head(self, cpus: int, most: int, *, idle_minutes: float) -> None:
        """`ray start` on the head, with Ray's autoscaler: up to `most` nodes of one CPU come when they are needed,
        and leave when they were idle for so long. They are Ray's fake nodes, processes of the same host."""
        head = "f" * 51 + "00000"
        kinds = {
            "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        }
        provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        config = {
            "cluster_name": "fake",
            "max_workers": most,
            "idle_timeout_minutes": idle_minutes,
            "provider": {
                "type": "external",  # Ray's wheel lacks the defaults of `fake_multinode`
                "module": provider,
                "gcs_address": self.control_store,
                "head_node_id": head,
                "launch_multiple": True,
            },
            "available_node_types": kinds,
            "head_node_type": "ray.head.default",
            "auth": {},
            "file_mounts": {},
            **{f"{when}setup_commands": [] for when in ("", "head_", "worker_")},
            **{f"{which}_start_ray_commands": [] for which in ("head", "worker")},
            **{
                name: []
                for name in ("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
            },
            "file_mounts_sync_continuously": False,
        }
        path = self._folder / "autoscaler.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        told = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        told |= {"RAY_CLOUD_INSTANCE_ID": head, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
        self._start(0, cpus, [*_HEAD, f"--autoscaling-config={path}"], told)

    def _start(self, number: int, cpus: int, which: Sequence[str], told: Mapping[str, str] | None = None) -> None:
        folder = self._folder / f"{number}-{time.monotonic_ns()}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *which]
        options = ["--node-ip-address", self.address(number), "--num-cpus", str(cpus), "--temp-dir", str(folder)]
        options += ["--object-store-memory", "200000000", "--disable-usage-stats"]
        # the hosts share this machine's name, by which gloo would look for an address
        _run(self.command(number, [*ray, *options]), os.environ | {"GLOO_SOCKET_IFNAME": "eth0"} | (told or {}))

    def cut(self, number: int) -> None:
        """Pull a host's plug out of the switch."""
        _ip("-n", self._switch, "link", "set", f"v{number}", "down")

    def join(self, number: int) -> None:
        """Put it in again."""
        _ip("-n", self._switch, "link", "set", f"v{number}", "up")

    def kill(self, number: int) -> None:
        """End all processes of a host at once, as a loss of power does."""
        for process in self._processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _processes(self, number: int) -> list[psutil.Process]:
        listed = subprocess.run(["ip", "netns", "pids", self._host(number)], capture_output=True, text=True)
        found = []
        for pid in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def sent(self, number: int) -> int:
        """Bytes that a host has sent to others."""
        shown = _run(["ip", "netns", "exec", self._host(number), "cat", "/sys/class/net/eth0/statistics/tx_bytes"])
        return int(shown)

    def down(self) -> None:
        """End what runs on the hosts, and take them away."""
        for number in range(self._count):
            deadline = time.monotonic() + 20
            while (left := self._processes(number)) and time.monotonic() < deadline:
                self.kill(number)
                psutil.wait_procs(left, timeout=2)
            subprocess.run(["ip", "netns", "delete", self._host(number)], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self._switch], capture_output=True)


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """So many hosts for as long as the block lasts."""
    made = Hosts(folder, count)
    try:
        yield made
    finally:
        made.down()


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
