"""Advantages: from the rewards of a step to what each token's log-prob is pushed by.

Shapes: N groups, G completions a group, T token positions, the longest completion's. An advantage is a function of
`Rewards` that gives `[N, G, 1]`, the same for all tokens of a completion, or `[N, G, T]`; NaN leaves a completion out
of the update.
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


def preference(rewards: Rewards) -> np.ndarray:
    """Online DPO (2402.04792, with the loss of 2305.18290) on the best and the worst of each group, `[N, G, 1]`.

    With Δ the difference of their Σ log π − log π_ref, which `kl_NGT` holds as k1, the gradient of −log σ(β Δ) is that
    of −β σ(−β Δ) (log π(best) − log π(worst)). So β σ(−β Δ) is the advantage of the one, its negative of the other;
    twice that, since a mean over completions counts a pair twice. The rest of a group is left out. A group whose
    rewards are all equal has no pair: its advantages are 0.
    """
    task_NG, beta = rewards.task_NG, rewards.kl_coefficient
    rows, best_N, worst_N = np.arange(len(task_NG)), task_NG.argmax(axis=1), task_NG.argmin(axis=1)
    ratio_NG = rewards.kl_NGT.sum(axis=2)
    push_N = 2 * beta / (1 + np.exp(beta * (ratio_NG[rows, best_N] - ratio_NG[rows, worst_N])))
    pushes_NG = np.full(task_NG.shape, np.nan)
    pushes_NG[rows, best_N], pushes_NG[rows, worst_N] = push_N, -push_N
    pushes_NG[best_N == worst_N] = 0.0
    return pushes_NG[:, :, None]


def gae(
    rewards_BT: np.ndarray,
    values_BT: np.ndarray,
    mask_BT: np.ndarray,
    bootstrap_B: np.ndarray,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (1506.02438): advantages, and returns that a critic learns; `[B, T]`.

    A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t; returns are A + V. `bootstrap_B` is the value after the
    last token: 0 where a completion ended, the critic's where it was cut. What stands beyond the end has no effect.
    """
    advantages_BT = np.zeros(values_BT.shape)
    next_value_B, next_advantage_B = np.asarray(bootstrap_B, np.float64), np.zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        on_B = mask_BT[:, t] > 0
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = np.where(on_B, delta_B + gamma * lam * next_advantage_B, 0.0)
        next_value_B = np.where(on_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, np.where(mask_BT > 0, advantages_BT + values_BT, 0.0)


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
