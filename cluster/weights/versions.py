"""The versions a run publishes: numbers that only grow, and never an update that does not show."""

from dataclasses import dataclass
from typing import Any

from ..errors import RunFailed
from .transport import Parcel


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """A published version: `parcel` says how to get the tensors, `config` is the adapter's PEFT config (of a whole
    model `{}`), `base` the digest of the model folder below."""

    version: int
    digest: str
    parcel: Parcel
    config: dict[str, Any]
    base: str


class WeightStore:
    """The versions a run has published; only the controller writes it.

    Versions only grow, and one that follows a non-zero update must have a new digest: a policy whose update did not
    reach the publisher is caught here instead of training on stale samples.
    """

    def __init__(self) -> None:
        self._current: WeightVersion | None = None

    @property
    def current(self) -> WeightVersion:
        """The newest version. Raises `RunFailed` before the first."""
        if self._current is None:
            raise RunFailed("no weights have been published yet")
        return self._current

    def publish(self, weights: WeightVersion, *, changed: bool) -> WeightVersion:
        """Make a version the current one; `changed` says whether an update was not zero. Raises `RunFailed`."""
        before = self._current
        if before is not None:
            if weights.version <= before.version:
                raise RunFailed(f"weight version {weights.version} does not follow {before.version}")
            if changed and weights.digest == before.digest:
                raise RunFailed(
                    f"weight version {weights.version} has the digest of version {before.version} "
                    "after a non-zero update"
                )
        self._current = weights
        return weights
