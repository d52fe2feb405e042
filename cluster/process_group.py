"""Groups of processes that compute together through torch.distributed: where they meet, and how one takes its seat.

The ports of a group know no token: keep them on a network of your own. Each listens on one of Ray's own addresses, or
on the interface that has it.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in a group: which it is, and where the group meets."""

    rank: int
    size: int
    host: str
    port: int
    name: str
    """Of the meeting: one store may see many groups, one after the other."""
    meet_seconds: float
    """How long the ranks wait for each other at first."""
    timeout: float
    """How long an operation of the group may wait for a rank, in seconds."""


def open_store(host: str) -> Any:
    """A store of torch's that listens on a free port of this address; members meet there while it lives."""
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        return distributed().TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def take(seat: Seat, device: str) -> None:
    """Become a rank of this process's one group, once all are here: gloo, and nccl beside it where they have GPUs.

    Raises `RuntimeError` where the others do not come within `meet_seconds`.
    """
    dist = distributed()
    if interface := interface_of(_own_address(seat)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    meeting = timedelta(seconds=seat.meet_seconds)
    store = dist.TCPStore(seat.host, seat.port, is_master=False, timeout=meeting, wait_for_workers=False)
    here = dist.PrefixStore(seat.name, store)
    here.set(f"rank {seat.rank}", "is here")
    here.wait([f"rank {rank}" for rank in range(seat.size)], meeting)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=here,
        rank=seat.rank,
        world_size=seat.size,
        timeout=timedelta(seconds=seat.timeout),
    )


def _own_address(seat: Seat) -> str:
    """The address of this machine that reaches the meeting."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((seat.host, seat.port))  # sends nothing
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The network interface that has an address, the loopback one for any of 127.0.0.0/8; empty where none has it."""
    import psutil

    interfaces = psutil.net_if_addrs()
    by_address = {entry.address: name for name, entries in interfaces.items() for entry in entries}
    return by_address.get("127.0.0.1" if address.startswith("127.") else address, "")


def distributed() -> Any:
    """`torch.distributed`, whose stores and process groups its type stubs do not export."""
    import torch.distributed

    return torch.distributed
