"""Where the ranks of a group meet, on which addresses, and one whose peers never come."""

import socket

import psutil
import pytest
from raylign.cluster.process_group import Seat, interface_of, open_store, take


def seat(store: object, rank: int, seconds: float) -> Seat:
    host, port = store.host, store.port  # type: ignore[attr-defined]
    return Seat(rank=rank, size=2, host=host, port=port, name="test", meet_seconds=seconds, timeout=seconds)


def test_a_rank_whose_peers_do_not_come_says_so_in_time() -> None:
    store = open_store("127.0.0.1")
    with pytest.raises(RuntimeError, match=r"(?i)timeout"):
        take(seat(store, 0, 0.2), "cpu")


def test_a_store_listens_on_its_address_alone() -> None:
    store = open_store("127.0.0.1")
    listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.laddr and c.laddr.port == store.port}
    assert listening == {"127.0.0.1"}


def test_interfaces_by_address() -> None:
    addresses = {a.address: n for n, held in psutil.net_if_addrs().items() for a in held if a.family == socket.AF_INET}
    assert all(interface_of(address) == name for address, name in addresses.items())
    assert interface_of("127.0.0.2") == interface_of("127.0.0.1")
    assert interface_of("192.0.2.1") == ""
