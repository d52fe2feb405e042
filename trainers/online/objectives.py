"""Objectives: what a loss charges for each token, before it is corrected, masked and added up by `policy_loss`.

Shapes: B samples, T completion positions. An objective is a function of the probability ratio policy / policy before
the step, the log-probs, the advantages (all `[B, T]`) and the bounds of the ratio; it gives a term per token, `[B, T]`,
to be minimised.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..stages import ClipConfig

Objective = Callable[[Tensor, Tensor, Tensor, ClipConfig], Tensor]


def clipped(ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, clip: ClipConfig) -> Tensor:
    """PPO's clipped surrogate (1707.06347), with separate bounds (DAPO 2503.14476) and a dual clip (1912.09729).

    −min(r A, clip(r, 1 − low, 1 + high) A); where A < 0 it is at most −dual · A, so that one exploding ratio cannot
    dominate the step.
    """
    plain = -ratio_BT * advantages_BT
    bounded = -ratio_BT.clamp(1 - clip.low, 1 + clip.high) * advantages_BT
    loss_BT = torch.maximum(plain, bounded)
    if clip.dual is None:
        return loss_BT
    return torch.where(advantages_BT < 0, torch.minimum(loss_BT, -clip.dual * advantages_BT), loss_BT)


def cispo(ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, clip: ClipConfig) -> Tensor:
    """CISPO (MiniMax-M1 2506.13585): −sg(min(r, 1 + high)) · A · log π; no token loses its gradient."""
    return -ratio_BT.detach().clamp(max=1 + clip.high) * advantages_BT * logprobs_BT
