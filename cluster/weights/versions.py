"""The versions a run publishes: numbers that only grow, and never an update that does not show."""

from collections.abc import Sequence
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

    Step t comes from version max(0, t − staleness): versions are held for as long as a step is to come from them.
    Versions only grow, and one that follows a non-zero update must have a new digest: a policy whose update did not
    reach the publisher is caught here instead of training on stale samples. A number names one content for good: after
    `begin_at` a version that is made again must come out as it was, where the run is `exact`.
    """

    def __init__(self, *, staleness: int = 0, exact: bool = True) -> None:
        self._staleness, self._exact = staleness, exact
        self._current: WeightVersion | None = None
        self._held: dict[int, WeightVersion] = {}
        self._digests: dict[int, str] = {}
        """Version → its digest, of all that were published."""

    @property
    def current(self) -> WeightVersion:
        """The newest version. Raises `RunFailed` before the first."""
        if self._current is None:
            raise RunFailed("no weights have been published yet")
        return self._current

    def due(self, step: int) -> int:
        """The version from which a step comes."""
        return max(0, step - self._staleness)

    def has(self, step: int) -> bool:
        """Whether the version is there from which a step comes."""
        return self.due(step) in self._held

    def of_step(self, step: int) -> WeightVersion:
        """The version from which a step comes. Raises `RunFailed` where it is not there."""
        if not self.has(step):
            there = ", ".join(map(str, self._held)) or "none"
            raise RunFailed(f"step {step} comes from weight version {self.due(step)}, and there is {there}")
        return self._held[self.due(step)]

    def before(self) -> list[WeightVersion]:
        """The versions before the current one from which the next steps come, oldest first."""
        return [self._held[version] for version in range(self.due(self.current.version), self.current.version)]

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

    def begin_at(self, weights: WeightVersion, before: Sequence[WeightVersion] = ()) -> WeightVersion:
        """Go on from a version: the first, or an earlier one again, with those `before` it that steps still come from.

        Raises `RunFailed` if the content of one is another than it was.
        """
        self._held.clear()
        for held in (*before, weights):
            self._refuse_another(held)
            self._put(held)
        return weights

    def _put(self, weights: WeightVersion) -> WeightVersion:
        self._current = weights
        self._digests[weights.version] = weights.digest
        self._held[weights.version] = weights
        for version in [v for v in self._held if v < self.due(weights.version)]:
            del self._held[version]
        return weights

    def _refuse_another(self, weights: WeightVersion) -> None:
        before = self._digests.get(weights.version, weights.digest)
        if weights.digest != before:
            raise RunFailed(
                f"weight version {weights.version} was {before[:12]} and came out as {weights.digest[:12]} when it was "
                "made again: this machine or recipe does not repeat a step bit for bit"
            )
