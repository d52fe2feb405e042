"""The gap between the trainer's log-probs of sampled tokens and the engine's: weights that correct it, and its size.

Shapes: B samples, T completion positions; `mask_BT` is 1 where a completion token stands.
"""

import torch
from torch import Tensor

from ..stages import MismatchConfig


def mismatch_weights(old_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, rule: MismatchConfig | None) -> Tensor:
    """Importance weights π_trainer / π_engine, no gradient, `[B, T]`; ones without a rule.

    Of each token, or of the completion: the product over its tokens. `truncate` bounds them (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"), `mask` sets those outside the bounds to 0
    (IcePop, 2510.18855).
    """
    if rule is None:
        return torch.ones_like(old_BT)
    gap_BT = (old_BT - behaviour_BT).detach() * mask_BT
    if rule.level == "sequence":
        gap_BT = gap_BT.sum(-1, keepdim=True).expand_as(gap_BT)
    ratio_BT = gap_BT.exp()
    if rule.action == "truncate":
        return ratio_BT.clamp(min=rule.low, max=rule.high)
    return torch.where((ratio_BT >= (rule.low or 0.0)) & (ratio_BT <= rule.high), ratio_BT, 0.0)


def mismatch_metrics(
    old_BT: Tensor, behaviour_BT: Tensor, weights_BT: Tensor, mask_BT: Tensor, total_tokens: int
) -> dict[str, float]:
    """Shares of the step's means: |Δ log-prob|, KL(engine ‖ trainer) and tokens masked; and the largest |Δ log-prob|.

    The tokens are the engine's, so e^d − d − 1 with d = log π_trainer − log π_engine has the KL as its expectation.
    """
    gap_BT = (old_BT - behaviour_BT).detach() * mask_BT
    kl_BT = gap_BT.exp() - gap_BT - 1
    masked_BT = (weights_BT == 0) * mask_BT
    shares = {"mean": gap_BT.abs(), "kl": kl_BT, "masked": masked_BT}
    means = {f"mismatch/{name}": (x.sum() / max(total_tokens, 1)).item() for name, x in shares.items()}
    return means | {"mismatch/max": gap_BT.abs().max().item()}
