"""Several hosts on this machine: network namespaces, each with an address and a Ray node of its own, on one switch.

Processes of two hosts reach each other by their addresses alone, at the bandwidth of their links, and a link can be
cut. They share the file system, as hosts with a common storage do. Needs root and Linux.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

_NET = "10.99.7"
_PORT = 6379


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

    def start_node(self, number: int, cpus: int) -> None:
        """`ray start` on a host, the head's or one that joins it."""
        head = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
        joins = ["--address", self.control_store]
        folder = self._folder / f"{number}-{time.monotonic_ns()}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *(joins if number else head)]
        options = ["--node-ip-address", self.address(number), "--num-cpus", str(cpus), "--temp-dir", str(folder)]
        options += ["--object-store-memory", "200000000", "--disable-usage-stats"]
        _run(self.command(number, [*ray, *options]))

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


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
