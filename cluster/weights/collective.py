"""Weights by broadcast: a torch.distributed process group of the policy and a fleet of workers that stays."""

import socket
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import numpy as np

from ..config import WeightsConfig
from ..errors import RunFailed
from ..process_group import distributed, open_store
from .pieces import Entry, Piece, piece_bytes
from .transport import Channel, ObjectStore, Parcel, Transport

MEET_SECONDS = 60.0
"""How long the members of a new group wait for each other."""

Backend = Literal["nccl", "gloo"]


class Collective:
    """Broadcasts a version from the policy, rank 0, to every worker at once, piece by piece.

    A group cannot grow and does not survive a death. So the object store has every version too: a worker that is not a
    member, or whose group broke, takes it from there, and the next version is sent through a new group of the workers
    there are then. With `regroup` off a lost group is a `RunFailed` instead. `timeout` bounds each piece; gloo sees a
    death at once, NCCL by torch's watchdog after `timeout`. The group's ports know no token: keep them on a network of
    your own (the rendezvous and gloo listen on this node's Ray address only).
    """

    def __init__(self, backend: Backend, *, regroup: bool, timeout: float, meet: float = MEET_SECONDS) -> None:
        self._backend: Backend = backend
        self._regroup, self._timeout, self._meet = regroup, timeout, meet
        self._store = ObjectStore()
        self._channel: Channel | None = None
        self._rendezvous: Any = None
        self._group: Any = None
        self._broadcast: threading.Thread | None = None
        self._trouble = ""
        self._broken = ""
        """Name of the channel that this worker has given up."""
        self._opened = 0

    def send(self, pieces: Sequence[Piece], receivers: Iterable[str]) -> Parcel:
        """Put the pieces into the object store and begin to broadcast them; does not wait for the workers.

        Raises `RunFailed` for a lost group where it may not be replaced.
        """
        parcel = self._store.send(pieces)
        members = tuple(receivers)
        note = self._settle(members)
        if not members:
            return replace(parcel, note=note)
        if self._channel is None:
            self._open(members)
        self._broadcast = threading.Thread(target=self._send, args=(parcel,), name="broadcast", daemon=True)
        self._broadcast.start()
        return replace(parcel, channel=self._channel, layouts=tuple(piece.layout for piece in pieces), note=note)

    def _settle(self, members: tuple[str, ...]) -> str:
        """Wait for the broadcast before; give up a group that broke or has other members, and say so."""
        if self._broadcast:
            self._broadcast.join()
        channel, self._broadcast = self._channel, None
        if channel is None or (not self._trouble and channel.members == members):
            return ""
        gone = sorted(set(channel.members) - set(members))
        why = self._trouble or (f"{', '.join(gone)} left it" if gone else "workers joined")
        note = f"the {self._backend} group of {', '.join(channel.members)} ended: {why}"
        self.close()
        if not self._regroup:
            raise RunFailed(f"{note}; rollout.weights.on_loss is fail, object_store would go on without it")
        return note

    def _open(self, members: tuple[str, ...]) -> None:
        """Listen where the members of a new group meet."""
        self._opened += 1
        self._rendezvous = store = open_store(_address())
        name = f"{socket.gethostname()}-{store.port}-{self._opened}"
        self._channel = Channel(name, store.host, store.port, members)

    def _send(self, parcel: Parcel) -> None:
        """Broadcast a parcel's pieces as the store has them, since the policy goes on learning.

        What goes wrong is told with the next version; workers notice it themselves.
        """
        channel = self._channel
        assert channel is not None
        try:
            if self._group is None:
                self._group = self._meet_as(0, channel, self._rendezvous)
            for piece in self._store.receive(parcel, "the policy", timeout=self._timeout):
                self._move(piece.data)
        except Exception as error:  # noqa: BLE001  nobody waits for this thread
            self.close()  # so that no member waits for more
            self._channel, self._trouble = channel, _first_line(error)

    def receive(self, parcel: Parcel, name: str, *, timeout: float) -> list[Piece]:
        """Take part in the parcel's broadcast where this worker is a member, else read the object store.

        Raises `RunFailed` for a broken group where the object store may not stand in.
        """
        channel = parcel.channel
        if channel is None or name not in channel.members or channel.name == self._broken:
            return self._store.receive(parcel, name, timeout=timeout)
        try:
            self._join(channel, name)
            return [self._take(layout) for layout in parcel.layouts]
        except RuntimeError as error:
            self.close()
            self._broken = channel.name
            if self._regroup:
                return self._store.receive(parcel, name, timeout=timeout)
            raise RunFailed(
                f"the {self._backend} group of {', '.join(channel.members)} broke at {name}: {_first_line(error)}; "
                "rollout.weights.on_loss is fail, object_store would go on without it"
            ) from error

    def _join(self, channel: Channel, name: str) -> None:
        if self._channel == channel:
            return
        self.close()
        dist = distributed()
        store = dist.TCPStore(
            channel.host, channel.port, is_master=False, timeout=timedelta(seconds=self._meet), wait_for_workers=False
        )
        self._group = self._meet_as(channel.members.index(name) + 1, channel, store)
        self._rendezvous, self._channel = store, channel

    def _meet_as(self, rank: int, channel: Channel, store: Any) -> Any:
        dist = distributed()
        meeting = dist.PrefixStore(channel.name, store)
        meeting.set_timeout(timedelta(seconds=self._meet))
        size, limit = len(channel.members) + 1, timedelta(seconds=self._timeout)
        if self._backend == "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=_address())]
            options._timeout = limit
            return dist.ProcessGroupGloo(meeting, rank, size, options)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(meeting, rank, size, options)

    def _take(self, layout: tuple[Entry, ...]) -> Piece:
        """One piece, as the broadcast brought it."""
        received = self._move(np.empty(piece_bytes(layout), np.uint8))
        received.setflags(write=False)
        return Piece(layout, received)

    def _move(self, flat: np.ndarray) -> np.ndarray:
        """Broadcast bytes from rank 0: what it gives, and what the others get."""
        import torch

        device = "cuda" if self._backend == "nccl" else "cpu"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rank 0's is read-only, and nothing writes to it
            tensor = torch.from_numpy(flat).to(device)
        self._group.broadcast(tensor, 0).wait()
        return tensor.cpu().numpy()

    def close(self) -> None:
        """Leave the group."""
        with suppress(RuntimeError):
            if self._group is not None:
                self._group.abort()
        self._group = self._rendezvous = self._channel = None
        self._trouble = ""


def open_transport(config: WeightsConfig, *, timeout: float) -> Transport:
    """What a recipe's `rollout.weights` names."""
    if config.transport == "nccl":
        return Collective("nccl", regroup=config.on_loss == "object_store", timeout=timeout)
    return ObjectStore()


def _address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _first_line(error: BaseException) -> str:
    """What happened, without the advice and backtraces that torch adds."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__
