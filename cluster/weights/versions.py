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
    reach the publisher is caught here instead of training on stale samples. A number names one content for good: after
    `begin_at` a version that is made again must come out as it was, where the run is `exact`.
    """

    def __init__(self, *, exact: bool = True) -> None:
        self._exact = exact
        self._current: WeightVersion | None = None
        self._digests: dict[int, str] = {}
        """Version → its digest, of all that were published."""

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
        if self._exact:
            self._refuse_another(weights)
        return self._put(weights)

    def begin_at(self, weights: WeightVersion) -> WeightVersion:
        """Go on from a version: the first, or an earlier one again. Raises `RunFailed` if its content is another."""
        self._refuse_another(weights)
        return self._put(weights)

    def _put(self, weights: WeightVersion) -> WeightVersion:
        self._current = weights
        self._digests[weights.version] = weights.digest
        return weights

    def _refuse_another(self, weights: WeightVersion) -> None:
        before = self._digests.get(weights.version, weights.digest)
        if weights.digest != before:
            raise RunFailed(
                f"weight version {weights.version} was {before[:12]} and came out as {weights.digest[:12]} when it was "
                "made again: this machine or recipe does not repeat a step bit for bit"
            )
