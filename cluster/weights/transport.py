"""How a version's tensors come from the policy to the rollout workers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..calls import get
from .digests import Tensors

BUCKET_BYTES = 64 << 20
"""Of one object. A node that has a whole object passes it on, so a large model in one object would reach the second
node only after the first has all of it."""

Layout = tuple[tuple[tuple[str, str, tuple[int, ...]], ...], ...]
"""Per bucket, its tensors' names, dtypes and shapes."""


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
    layout: Layout = ()
    """What the broadcast carries."""
    note: str = ""
    """What the run should say of the way it came, such as that a process group was lost."""


class Transport(Protocol):
    """The policy sends, every worker receives; each has an object of its own."""

    def send(self, tensors: Tensors, receivers: Iterable[str]) -> Parcel:
        """Take a snapshot of the tensors and make it available to workers, those of these names first of all."""
        ...

    def receive(self, parcel: Parcel, name: str, *, timeout: float) -> Tensors:
        """The tensors of a parcel, read-only, at the worker of this name. Raises `WorkerLost` when they are gone."""
        ...

    def close(self) -> None:
        """Give up what the transport holds."""
        ...


class ObjectStore:
    """Through Ray's object store: put once, in buckets; each node pulls a bucket once, from any node that has it, and
    its workers read the same memory. Workers may come and go."""

    def send(self, tensors: Tensors, receivers: Iterable[str] = ()) -> Parcel:
        """One copy into shared memory: Ray takes contiguous numpy arrays out of band."""
        import ray

        return Parcel(tuple(ray.put({name: tensors[name] for name in names}) for names in in_buckets(tensors)))

    def receive(self, parcel: Parcel, name: str, *, timeout: float) -> Tensors:
        """Views of this node's shared memory, without a copy."""
        return {key: array for bucket in self.buckets(parcel, timeout=timeout) for key, array in bucket.items()}

    def buckets(self, parcel: Parcel, *, timeout: float) -> list[Tensors]:
        """The parcel's objects, in order."""
        return get(list(parcel.buckets), actor="the object store", what="the weights' buckets", timeout=timeout)

    def close(self) -> None:
        """Nothing is held: a version's memory is free when its last reference is."""


def in_buckets(tensors: Tensors, limit: int = BUCKET_BYTES) -> list[list[str]]:
    """Names in their order, cut where a bucket would exceed `limit` bytes; a larger tensor has a bucket of its own."""
    buckets: list[list[str]] = []
    filled = 0
    for name, array in tensors.items():
        if not buckets or filled + array.nbytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += array.nbytes
    return buckets
