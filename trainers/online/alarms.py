"""Alarms: what goes wrong in a run long before it ends, seen in its metrics. Pure functions of the steps so far.

Each rule reads the metrics of all steps, oldest first, and compares means over `window` steps; it says nothing before
it has seen enough of them. An alarm says what it saw, with numbers, and what to try.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..stages import AlarmsConfig

History = Sequence[Mapping[str, float]]
"""The metrics of a stage's steps, in order."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was seen, and what may help."""

    name: str
    saw: str
    attempt: str


def alarms(history: History, config: AlarmsConfig) -> list[Alarm]:
    """The alarms that hold after the last step."""
    found = (rule(history, config.window) for name, rule in RULES.items() if name not in config.ignore)
    return [alarm for alarm in found if alarm]


def _recent(history: History, name: str, window: int, skip: int = 0) -> np.ndarray | None:
    """A metric in the last steps, before `skip` of them; none where there are not enough, or they lack it."""
    end = len(history) - skip
    lines = history[max(0, end - window) : end]
    if len(lines) < window or any(name not in line for line in lines):
        return None
    return np.array([line[name] for line in lines], np.float64)


def _first_and_last(history: History, name: str, window: int) -> tuple[float, float] | None:
    """The means over the first and the last steps that have a metric, where these are different ones."""
    values = [line[name] for line in history if name in line]
    if len(values) < 2 * window or name not in history[-1]:
        return None
    return float(np.mean(values[:window])), float(np.mean(values[-window:]))


def entropy_collapse(history: History, window: int) -> Alarm | None:
    """The policy's entropy fell below a tenth of what it began with."""
    found = _first_and_last(history, "entropy", window)
    if found is None or found[1] >= 0.1 * found[0]:
        return None
    return Alarm(
        "entropy_collapse",
        f"entropy is {found[1]:.3g} nats a token and began at {found[0]:.3g}: completions hardly differ any more",
        "end the run if the reward is as high as it gets; else a lower learning_rate, a higher clip.high, an "
        "entropy_bonus, or a kl block",
    )


def kl_blow_up(history: History, window: int) -> Alarm | None:
    """The KL to the reference is above 0.1 nats a token and grew tenfold from one window to the next."""
    now, before = _recent(history, "kl", window), _recent(history, "kl", window, skip=window)
    if now is None or before is None or now.mean() < max(0.1, 10 * before.mean()):
        return None
    return Alarm(
        "kl_blow_up",
        f"the KL to the reference is {now.mean():.3g} nats a token, {before.mean():.3g} in the {window} steps before",
        "a lower learning_rate, a higher kl.coefficient, or kl.adaptive; go on from the checkpoint before",
    )


def repetition(history: History, window: int) -> Alarm | None:
    """More than half of the completions' 4-grams were there before, twice as many as in the beginning."""
    found = _first_and_last(history, "repetition", window)
    if found is None or found[1] < max(0.5, 2 * found[0]):
        return None
    return Alarm(
        "repetition",
        f"{found[1]:.0%} of the 4-grams of completions repeat earlier ones, {found[0]:.0%} in the beginning",
        "look at samples/: a reward that pays for length or for a phrase; overlong, or a penalty of your own",
    )


def overfitting(history: History, window: int) -> Alarm | None:
    """The reward rises while that of held-out prompts has been falling for two measurements or more.

    Either counts as moved by a tenth of the reward's deviation.
    """
    asked = [i for i, line in enumerate(history) if "held_out/reward" in line]
    if len(asked) < 3:
        return None
    best = max(asked, key=lambda i: history[i]["held_out/reward"])
    now = asked[-1]
    trained = [[line["reward/mean"] for line in history[max(0, i + 1 - window) : i + 1] if "reward/mean" in line]
               for i in (best, now)]  # fmt: skip
    if sum(i > best for i in asked) < 2 or not all(trained):
        return None
    moved = 0.1 * float(np.mean([line["reward/std"] for line in history if "reward/std" in line]))
    fell = history[best]["held_out/reward"] - history[now]["held_out/reward"]
    rose = float(np.mean(trained[1]) - np.mean(trained[0]))
    if fell <= moved or rose <= moved:
        return None
    return Alarm(
        "overfitting",
        f"the reward rose by {rose:.3g} since step {best}, and fell by {fell:.3g} on held-out prompts: what is "
        "learned is the training prompts, or the reward's weak spots",
        f"take the checkpoint near step {best}; held_out.early_stop, more prompts, a kl block, another reward",
    )


def nothing_learned(history: History, window: int) -> Alarm | None:
    """No gradient at all."""
    norms = _recent(history, "grad_norm", window)
    if norms is None or norms.max() > 0:
        return None
    return Alarm(
        "nothing_learned",
        f"the gradient was 0 in each of the last {window} steps",
        "look at the rewards in samples/: all alike, or all completions masked",
    )


def no_variance(history: History, window: int) -> Alarm | None:
    """Nineteen groups in twenty have completions that are all worth the same."""
    groups, drawn = _recent(history, "groups/no_variance", window), _recent(history, "groups/drawn", window)
    if groups is None or drawn is None or groups.sum() < 0.95 * drawn.sum():
        return None
    rewards = _recent(history, "reward/mean", window)
    worth = f", {rewards.mean():.3g} on average" if rewards is not None else ""
    return Alarm(
        "no_variance",
        f"in {groups.sum():.0f} of the last {drawn.sum():.0f} groups all completions have the same reward{worth}",
        "prompts that are neither too easy nor too hard, a larger group_size, a finer reward, or dynamic_sampling",
    )


def truncation(history: History, window: int) -> Alarm | None:
    """More than half of the completions were cut at `max_tokens`, twice as many as in the beginning or nearly all."""
    found, now = _first_and_last(history, "truncated", window), _recent(history, "truncated", window)
    if now is None or not (now.mean() > 0.9 or (found and found[1] > max(0.5, 2 * found[0]))):
        return None
    return Alarm(
        "truncation",
        f"{now.mean():.0%} of completions were cut at rollout.sampling.max_tokens",
        "a larger max_tokens, overlong, or mask_truncated; if none ever ends, the template's stop token",
    )


RULES: dict[str, Callable[[History, int], Alarm | None]] = {
    rule.__name__: rule
    for rule in (entropy_collapse, kl_blow_up, repetition, overfitting, nothing_learned, no_variance, truncation)
}
