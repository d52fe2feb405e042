"""What a step of online RL says of itself: pure functions from groups and phase times to numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...rollout.records import Group
from .batch import TrainSample
from .experience import has_variance
from .progress import completion_kl


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards by part, lengths (tokens) and truncation over all samples."""
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([s.reward for s in samples], np.float64)
    lengths = np.array([s.drawn for s in samples])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "completion_length/mean": float(lengths.mean()),
        "completion_length/max": float(lengths.max()),
        "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "truncated/count": float(sum(s.finish_reason == "length" for s in samples)),
        "tokens": float(lengths.sum()),
        "repetition": float(np.mean([repetition(s.tokens) for s in samples])),
    }
    if any(s.environment is not None for s in samples):
        metrics["turns/mean"] = float(np.mean([s.turns for s in samples]))
    for part in samples[0].reward_parts:
        values = [s.reward_parts[part] for s in samples]
        metrics |= {f"reward/{part}": float(np.mean(values)), f"reward/{part}/std": float(np.std(values))}
    return metrics


def repetition(tokens: np.ndarray, size: int = 4) -> float:
    """The share of a completion's n-grams that stood in it before; 0 for one that is too short to have two."""
    if len(tokens) <= size:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, size)
    return 1 - len({gram.tobytes() for gram in grams}) / len(grams)


def advantage_metrics(samples: Sequence[TrainSample]) -> dict[str, float]:
    """Mean, deviation and largest size of the advantages over all tokens of a step; empty where there are none."""
    known = [s.advantages[s.learned] for s in samples if len(s.advantages)]
    if not known:
        return {}
    advantages = np.concatenate(known, dtype=np.float64)
    return {
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std()),
        "advantage/max": float(np.abs(advantages).max()),
    }


def version_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Which weight versions made the samples, how many steps behind the update they were in the mean over tokens, and
    which share of the samples was carried from step to step; empty without samples."""
    samples = [s for g in groups for s in g.samples]
    spans = [(g.step, span) for g in groups for s in g.samples for span in s.spans]
    if not spans:
        return {}
    tokens = [span.tokens for _, span in spans]
    return {
        "version/min": float(min(span.version for _, span in spans)),
        "version/max": float(max(span.version for _, span in spans)),
        "staleness/mean": float(np.average([step - span.version for step, span in spans], weights=tokens)),
        "carried": float(np.mean([len(s.spans) > 1 for s in samples])),
    }


def kl_metrics(groups: Sequence[Group], coefficient: float) -> dict[str, float]:
    """The coefficient of the step and the KL to the reference, nats a completion and a token; empty where KL is off.

    A KL in the loss is measured there too, by its own estimator and with the trainer's log-probs: that one stands.
    """
    per_completion = completion_kl(groups)
    if per_completion is None:
        return {}
    lengths = [s.drawn for g in groups for s in g.samples]
    per_token = per_completion * len(lengths) / sum(lengths)
    return {"kl/coefficient": coefficient, "kl/completion": per_completion, "kl": per_token}


def spans_by_worker(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """From when to when each worker generated, over all its groups of a step."""
    spans: dict[str, tuple[float, float]] = {}
    for group in groups:
        start, end = spans.get(group.worker, (group.start, group.start))
        spans[group.worker] = (min(start, group.start), max(end, group.start + group.seconds))
    return spans


def group_metrics(finished: Sequence[Group], scored: Sequence[Group]) -> dict[str, float]:
    """What a step's finished groups were like, and, `scored`, what they are worth in the end."""
    sound = [group for group in scored if not group.error]
    return (rollout_metrics(sound) if sound else {}) | {
        **version_metrics(finished),
        "groups/no_variance": float(sum(not g.error and not has_variance(g) for g in finished)),
        "groups/error": float(len(finished) - len(sound)),
    }


_WORK = {"generate": "rollout", "reference": "reference", "values": "critic", "update": "policy"}
"""Phases in which a role handles a step's tokens."""


def time_metrics(phases: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Seconds in each phase of a step, and its tokens a second: over all phases, and by role over its own."""
    seconds = {f"seconds/{phase}": took for phase, took in phases.items()}
    rates = {
        f"tokens_per_second/{_WORK[phase]}": tokens / max(t, 1e-9) for phase, t in phases.items() if phase in _WORK
    }
    return seconds | rates | {"tokens_per_second": tokens / max(sum(phases.values()), 1e-9)}
