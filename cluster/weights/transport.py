"""How a version's tensors come from the policy to the rollout workers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..calls import get
from .pieces import Entry, Piece

BUCKET_BYTES = 64 << 20
"""Of one object. A node that has a whole object passes it on, so a large model in one object would reach the second
node only after the first has all of it."""


@dataclass(frozen=True, slots=True)
class Channel:
    """Where a process group meets; `members[i]` is rank `i + 1`, the policy rank 0. Each group has its own `name`."""

    name: str
    host: str
    port: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parcel:
    """One version on its way: `buckets` are references into the object store, in order. Pickles."""

    buckets: tuple[Any, ...]
    channel: Channel | None = None
    """Set where the members of a process group get the version by broadcast."""
    layouts: tuple[tuple[Entry, ...], ...] = ()
    """Of each piece that the broadcast carries."""
    note: str = ""
    """What the run should say of the way it came, such as that a process group was lost."""
    size: int = 0
    """Bytes of its tensors."""


class Transport(Protocol):
    """The policy sends, every worker receives; each has an object of its own."""

    def send(self, pieces: Sequence[Piece], receivers: Iterable[str]) -> Parcel:
        """Take a snapshot of the pieces and make it available to workers, those of these names first of all."""
        ...

    def receive(self, parcel: Parcel, name: str, *, timeout: float) -> list[Piece]:
        """The pieces of a parcel, read-only, at the worker of this name. Raises `WorkerLost` when they are gone."""
        ...

    def close(self) -> None:
        """Give up what the transport holds."""
        ...


class ObjectStore:
    """Through Ray's object store: put once, in buckets; each node pulls a bucket once, from any node that has it, and
    its workers read the same memory. Workers may come and go."""

    def send(self, pieces: Sequence[Piece], receivers: Iterable[str] = ()) -> Parcel:
        """One copy into shared memory: Ray takes contiguous numpy arrays out of band."""
        import ray

        size = sum(piece.data.nbytes for piece in pieces)
        return Parcel(tuple(ray.put(bucket) for bucket in in_buckets(pieces)), size=size)

    def receive(self, parcel: Parcel, name: str, *, timeout: float) -> list[Piece]:
        """Views of this node's shared memory, without a copy."""
        buckets = get(list(parcel.buckets), actor="the object store", what="the weights' buckets", timeout=timeout)
        return [piece for bucket in buckets for piece in bucket]

    def close(self) -> None:
        """Nothing is held: a version's memory is free when its last reference is."""


def in_buckets(pieces: Iterable[Piece], limit: int = BUCKET_BYTES) -> list[list[Piece]]:
    """Pieces in their order, cut where a bucket would exceed `limit` bytes; a larger piece has a bucket of its own."""
    buckets: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not buckets or filled + piece.data.nbytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(piece)
        filled += piece.data.nbytes
    return buckets
