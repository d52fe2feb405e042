"""What a step of online RL says of itself: pure functions from groups and phase times to numbers."""

from collections.abc import Sequence

import numpy as np

from ...rollout.records import Group


def rollout_metrics(groups: Sequence[Group], varies: np.ndarray) -> dict[str, float]:
    """Rewards by part, lengths (tokens) and truncation over all samples, and groups that teach nothing.

    `varies` `[N]` marks the groups whose rewards differ.
    """
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([s.reward for s in samples], np.float64)
    lengths = np.array([len(s.tokens) for s in samples])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "completion_length/mean": float(lengths.mean()),
        "completion_length/max": float(lengths.max()),
        "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "groups/no_variance": float((~varies).sum()),
        "tokens": float(lengths.sum()),
    }
    for part in samples[0].reward_parts:
        metrics[f"reward/{part}"] = float(np.mean([s.reward_parts[part] for s in samples]))
    return metrics


def spans_by_worker(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """From when to when each worker generated, over all its groups of a step."""
    spans: dict[str, tuple[float, float]] = {}
    for group in groups:
        start, end = spans.get(group.worker, (group.start, group.start))
        spans[group.worker] = (min(start, group.start), max(end, group.start + group.seconds))
    return spans
