"""Advantages: from the rewards of a step to what each token's log-prob is pushed by.

Shapes: N groups, G completions a group, T token positions, the longest completion's. `rewards_NGT` are 0 beyond a
completion's end; a reward of the whole completion stands at its last token. An advantage is a function of them that
gives `[N, G, 1]`, the same for all tokens of a completion, or `[N, G, T]`.
"""

from collections.abc import Callable

import numpy as np

from ..stages import Scale

Advantage = Callable[[np.ndarray], np.ndarray]


def group_mean(rewards_NGT: np.ndarray) -> np.ndarray:
    """A completion's reward minus its group's mean (GRPO 2402.03300), `[N, G, 1]`.

    A group whose rewards are all equal teaches nothing: its advantages are exactly 0.
    """
    rewards_NG1 = rewards_NGT.sum(axis=2, keepdims=True)
    varies_N11 = np.ptp(rewards_NG1, axis=1, keepdims=True) > 0
    return np.where(varies_N11, rewards_NG1 - rewards_NG1.mean(axis=1, keepdims=True), 0.0)


def leave_one_out(rewards_NGT: np.ndarray) -> np.ndarray:
    """A completion's reward minus the mean of the others of its group (RLOO 2402.14740), `[N, G, 1]`.

    That is G / (G − 1) times its distance to the group's mean.
    """
    size = rewards_NGT.shape[1]
    return group_mean(rewards_NGT) * (size / (size - 1))


def returns(rewards_NGT: np.ndarray) -> np.ndarray:
    """The sum of a token's reward and all after it, `[N, G, T]`: no baseline of the group (REINFORCE++ 2501.03262)."""
    return rewards_NGT[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]


def scaled(advantages_NGt: np.ndarray, mask_NGT: np.ndarray, scale: Scale) -> np.ndarray:
    """Advantages `[N, G, 1 or T]` divided by a standard deviation (n − 1); 0 stays 0 where nothing varies.

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
        return advantages_NGt / np.sqrt((varying**2).sum() / (varying.size - 1))
    spread_N11 = advantages_NGt.std(axis=1, ddof=1, keepdims=True)
    return advantages_NGt / np.where(varies_N[:, None, None], spread_N11, 1.0)


def _whitened(advantages_NGt: np.ndarray, mask_NGT: np.ndarray) -> np.ndarray:
    """Mean 0 and std 1 over all tokens; all 0 where nothing varies."""
    at_token = mask_NGT > 0
    full_NGT = np.broadcast_to(advantages_NGt, mask_NGT.shape)
    values = full_NGT[at_token]
    centred_NGT = np.where(at_token, full_NGT - values.mean(), 0.0)
    if np.ptp(values) == 0:
        return np.zeros_like(centred_NGT)
    return centred_NGT / values.std(ddof=1)
