"""The length of a completion as a reward."""

from collections.abc import Iterator

from ..config import LengthReward
from ..records import Group


class LengthShaping:
    """Scores completions by their number of tokens."""

    overruns = 0

    def __init__(self, config: LengthReward) -> None:
        self._config = config

    def wait_ready(self) -> None:
        """It is."""

    def outcomes(self, group: Group) -> Iterator[float]:
        """The score of each sample."""
        return (soft_overlong(len(sample.tokens), self._config) for sample in group.samples)

    def counters(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing outlives it."""


def soft_overlong(tokens: int, config: LengthReward) -> float:
    """0 up to the buffer, -1 from `max_tokens` on, a line between (2503.14476, equation 13)."""
    over = tokens - (config.max_tokens - config.buffer)
    return -min(max(over / config.buffer, 0.0), 1.0)
