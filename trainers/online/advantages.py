"""Advantages: from the rewards of a step to what each completion's log-probs are pushed by.

Shapes: N groups, G completions a group.
"""

from typing import Literal

import numpy as np

Scale = Literal["none", "batch", "group"]


def group_advantages(rewards_NG: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Reward minus its group's mean, divided by a standard deviation; `[N, G]`, and which groups vary, `[N]`.

    `none` divides by nothing (Dr.GRPO 2503.20783), `batch` by the std of the centred rewards of all groups that vary
    (LitePPO 2508.08221, centred so that the spread between prompts does not count), `group` by the group's own std
    (GRPO 2402.03300). Std is over samples (n − 1). A group whose rewards are all equal teaches nothing: its advantages
    are 0 and it is marked as not varying.
    """
    rewards = np.asarray(rewards_NG, np.float64)
    varies_N = rewards.max(axis=1) > rewards.min(axis=1)
    centred = np.where(varies_N[:, None], rewards - rewards.mean(axis=1, keepdims=True), 0.0)
    if scale == "none" or not varies_N.any():
        return centred, varies_N
    if scale == "group":
        spread = np.where(varies_N, rewards.std(axis=1, ddof=1), 1.0)[:, None]
    else:
        spread = np.sqrt((centred[varies_N] ** 2).sum() / (centred[varies_N].size - 1))
    return centred / spread, varies_N
