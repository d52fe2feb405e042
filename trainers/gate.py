"""Whether a run's model may take over a name: it must answer the held-out questions as well as what answers now."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..serve.aliases import Move
from .config import EvaluationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says."""

    passed: bool
    why: str


def judge(
    after: Mapping[str, Any], before: Mapping[str, Any], incumbent: Move | None, questions: str, tolerance: float
) -> Verdict:
    """Compare mean accuracies over all temperatures; a model as good as the other less `tolerance` passes.

    `after` and `before` are the run's last model and the one that its last stage began with: `n` and an accuracy each
    temperature. The one to beat is what the name points at, if the same `questions` were asked of it, else `before`.
    """
    other, against = before, "what the last stage began with"
    if incumbent and incumbent.evaluation.get("questions") == questions:
        other, against = incumbent.evaluation["scores"], "what the name points at"
    new, old = _mean(after), _mean(other)
    compared = f"{new:.1%} of {after['n']} held-out questions right, {against} {old:.1%}"
    if new + tolerance < old:
        return Verdict(passed=False, why=f"worse: {compared}, and serve.tolerance is {tolerance:g}")
    return Verdict(passed=True, why=compared)


def judge_forgetting(rise: float | None, most: float) -> Verdict:
    """Whether the loss on general text rose, in nats a token, by no more than it may; one that is not known does not
    pass."""
    if rise is None:
        return Verdict(passed=False, why=f"not shown to keep what it knew, and serve.max_forgetting is {most:g}")
    said = f"the loss on general text rose by {rise:.3f} nats a token"
    if rise > most:
        return Verdict(passed=False, why=f"forgetful: {said}, and serve.max_forgetting is {most:g}")
    return Verdict(passed=True, why=said)


def questions_digest(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig, seed: int) -> str:
    """Of all that an evaluation's result depends on but the model: two results of one digest can be compared."""
    asked = evaluation.model_dump(mode="json", exclude={"data", "concurrency"})
    return digest_of([[dict(row) for row in rows], asked, seed])


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _mean(scores: Mapping[str, Any]) -> float:
    accuracies = [value for key, value in scores.items() if key not in ("n", "errors")]
    return sum(accuracies) / len(accuracies)
