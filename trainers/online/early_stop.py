"""When a stage ends before its last step: pure, of what was measured so far."""

from collections.abc import Sequence

from ..stages import EarlyStop


def is_over(measured: Sequence[float], rule: EarlyStop) -> bool:
    """Whether none of the last `patience` measurements is better, by more than `least`, than the best before them."""
    sign = 1 if rule.mode == "max" else -1
    before, last = measured[: -rule.patience], measured[-rule.patience :]
    return bool(before) and max(sign * m for m in last) <= max(sign * m for m in before) + rule.least
