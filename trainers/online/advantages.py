"""Advantages: from the rewards of a step to what each token's log-prob is pushed by.

Shapes: N groups, G completions a group, T token positions, the longest completion's. An advantage is a function of
`Rewards` that gives `[N, G, 1]`, the same for all tokens of a completion, or `[N, G, T]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..stages import Scale


class Rewards(NamedTuple):
    """What the completions of a step were worth."""

    task_NG: np.ndarray
    """The reward of each completion."""
    kl_NGT: np.ndarray
    """Estimates of the KL to the reference at each token, where it is taken off the reward; else 0, as beyond the end
    of a completion."""
    mask_NGT: np.ndarray
    """1 where a completion has a token."""
    kl_coefficient: float
    values_NGT: np.ndarray | None = None
    """What a critic expected still to come at each token."""
    gamma: float = 1.0
    """A token's discount of what comes after it, and λ of `gae`."""
    lam: float = 1.0

    @property
    def total_NG(self) -> np.ndarray:
        """The reward of each completion less β times its KL."""
        return self.task_NG - self.kl_coefficient * self.kl_NGT.sum(axis=2)


Advantage = Callable[[Rewards], np.ndarray]

LEAST_STD = 1e-4
"""What a smaller standard deviation counts as, so that the rounding of a KL does not become a signal; TRL adds it."""


def group_mean(rewards: Rewards) -> np.ndarray:
    """A completion's reward minus its group's mean (GRPO 2402.03300), `[N, G, 1]`.

    A group whose rewards are all equal teaches nothing: its advantages are exactly 0.
    """
    total_NG = rewards.total_NG
    varies_N1 = np.ptp(total_NG, axis=1, keepdims=True) > 0
    return np.where(varies_N1, total_NG - total_NG.mean(axis=1, keepdims=True), 0.0)[:, :, None]


def leave_one_out(rewards: Rewards) -> np.ndarray:
    """A completion's reward minus the mean of the others of its group (RLOO 2402.14740), `[N, G, 1]`.

    That is G / (G − 1) times its distance to the group's mean.
    """
    size = rewards.task_NG.shape[1]
    return group_mean(rewards) * (size / (size - 1))


def returns(rewards: Rewards) -> np.ndarray:
    """The reward less β times the KL of a token and all after it, `[N, G, T]` (REINFORCE++ 2501.03262).

    No baseline is taken off.
    """
    to_come_NGT = rewards.kl_NGT[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
    return (rewards.task_NG[:, :, None] - rewards.kl_coefficient * to_come_NGT) * rewards.mask_NGT


def gae(rewards: Rewards) -> np.ndarray:
    """Generalised advantage estimation (1506.02438): A_t = δ_t + γ λ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t; `[N, G, T]`.

    The reward r_t of a token is −β times its KL, and at the last one also what the completion was worth (InstructGPT,
    2203.02155). After it nothing is to come, also where it was cut: what a cut completion is worth is its reward. A + V
    is what a critic learns. Raises `ValueError` without values.
    """
    if rewards.values_NGT is None:
        raise ValueError("advantage gae needs a critic's values")
    on_NGT, discount = rewards.mask_NGT > 0, rewards.gamma * rewards.lam
    values_NGT = np.where(on_NGT, rewards.values_NGT, 0.0)
    last_NGT = on_NGT & ~_next(on_NGT)
    rewards_NGT = rewards.task_NG[:, :, None] * last_NGT - rewards.kl_coefficient * rewards.kl_NGT
    advantages_NGT = np.where(on_NGT, rewards_NGT + rewards.gamma * _next(values_NGT) - values_NGT, 0.0)
    for t in reversed(range(advantages_NGT.shape[2] - 1)):
        advantages_NGT[:, :, t] += discount * advantages_NGT[:, :, t + 1]
    return advantages_NGT


def _next(x_NGT: np.ndarray) -> np.ndarray:
    """What stands at the token after, nothing after the last."""
    return np.concatenate([x_NGT[:, :, 1:], np.zeros_like(x_NGT[:, :, :1])], axis=2)


def scaled(advantages_NGt: np.ndarray, mask_NGT: np.ndarray, scale: Scale) -> np.ndarray:
    """Advantages `[N, G, 1 or T]` divided by a standard deviation (n − 1), or by `LEAST_STD` where it is below that.

    `none` divides by nothing (Dr.GRPO 2503.20783), `batch` by the std about 0 over the groups that vary (LitePPO
    2508.08221, of centred rewards, so that the spread between prompts does not count), `group` by each group's own
    (GRPO 2402.03300). `tokens` takes off the mean over all tokens of the batch and divides by their std (REINFORCE++
    2501.03262); `mask_NGT` is 1 at tokens.
    """
    if scale == "tokens":
        return _whitened(advantages_NGt, mask_NGT)
    varies_N = np.abs(advantages_NGt).max(axis=(1, 2)) > 0
    if scale == "none" or not varies_N.any():
        return advantages_NGt
    if scale == "batch":
        varying = advantages_NGt[varies_N]
        return advantages_NGt / max(np.sqrt((varying**2).sum() / (varying.size - 1)), LEAST_STD)
    return advantages_NGt / advantages_NGt.std(axis=1, ddof=1, keepdims=True).clip(LEAST_STD)


def _whitened(advantages_NGt: np.ndarray, mask_NGT: np.ndarray) -> np.ndarray:
    """Mean 0 and std 1 over all tokens."""
    at_token = mask_NGT > 0
    full_NGT = np.broadcast_to(advantages_NGt, mask_NGT.shape)
    values = full_NGT[at_token]
    return np.where(at_token, full_NGT - values.mean(), 0.0) / max(values.std(ddof=1), LEAST_STD)
