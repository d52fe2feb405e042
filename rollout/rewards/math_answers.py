"""The math reward: is a completion's final answer equal to the gold one, as math-verify sees it?

math-verify's own time-out is `signal.alarm`, which fails off the main thread and cannot interrupt one long operation on
big integers, so it is switched off here; `reward_process` ends the process instead.
"""

import logging
import resource
from functools import lru_cache
from typing import Any

from ..config import MathReward
from .functions import RewardError, Row, ScoreFunction, gold_answer

_MEMORY_BYTES = 4 << 30
"""What a process that evaluates expressions may map; `10^{10^{10}}` alone would want more than a machine has."""


def math_function(config: MathReward) -> ScoreFunction:
    """`f(completion, row)`: 1.0 for an answer equal to the row's, else 0.0.

    A completion's answer is its `\\boxed{…}`, or else the last number or formula in it. Raises `RewardError` for a row
    without a readable gold answer, since every completion would count as wrong.
    """
    # Both announce on every process that time-outs are off; they are, on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(completion: str, row: Row) -> float:
        from math_verify import parse, verify

        gold = _parsed_gold(gold_answer(config, row))
        answer = parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return 1.0 if verify(gold, answer, timeout_seconds=None) else 0.0

    return score


def limit_memory() -> None:
    """Let this process map no more than a few GiB, so that a giant power fails instead of filling the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@lru_cache(maxsize=4096)  # a group asks for one gold answer G times
def _parsed_gold(gold: str) -> list[Any]:
    from math_verify import parse

    # Bare LaTeX is only read as such inside an environment: \frac{1}{2} alone may be taken for a number in it.
    text = gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"
    parsed = parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not parsed:
        raise RewardError(f"cannot read the gold answer {gold!r:.80} as mathematics")
    return parsed
