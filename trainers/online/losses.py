"""Policy losses and what they are made of: tensors in, `(loss, metrics)` out.

Shapes: B samples, T completion positions, V vocabulary. `mask_BT` is 1 where a completion token stands.
Losses are sums divided by `total_tokens`, the completion tokens of the whole optimizer step: so a gradient does not
depend on how a step is cut into micro-batches or spread over ranks. Metrics are sums over tokens, to be divided by the
same number by whoever adds the micro-batches up.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Metrics = dict[str, float]


class Clip(NamedTuple):
    """Bounds of the probability ratio: 1 − low, 1 + high, and the dual clip for negative advantages or none."""

    low: float = 0.2
    high: float = 0.28
    dual: float | None = 3.0


DEFAULT_CLIP = Clip()

Objective = Callable[[Tensor, Tensor, Tensor, Clip], Tensor]


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each token under the distribution it was sampled from, and that distribution's entropy; `[B, T]`.

    Logits are taken to fp32 before the softmax (ScaleRL 2510.13786). The distribution is that of the temperature alone
    (above 0), without top-p or top-k. The entropy has no gradient: a metric needs none, and its graph would be large.
    """
    logp_BTV = (logits_BTV.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    return logp_BTV.gather(-1, tokens_BT[..., None])[..., 0], entropy_BT


def kl_penalty(logprobs_BT: Tensor, reference_BT: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) on the policy's own samples (Schulman 2020), `[B, T]`.

    With d = log π_ref − log π: k1 = −d, k2 = d²/2, k3 = e^d − d − 1.
    """
    d = reference_BT - logprobs_BT
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.exp() - d - 1


def mismatch_weights(old_BT: Tensor, behaviour_BT: Tensor, cap: float | None) -> Tensor:
    """Truncated importance weights min(π_trainer / π_engine, cap) per token, no gradient, `[B, T]`; ones without a cap.

    They correct for the engine's arithmetic differing from the trainer's (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training").
    """
    if cap is None:
        return torch.ones_like(old_BT)
    return (old_BT - behaviour_BT).detach().exp().clamp(max=cap)


def clipped_objective(ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, clip: Clip) -> Tensor:
    """PPO's clipped surrogate, to be minimised, with separate bounds (DAPO 2503.14476) and a dual clip (1912.09729).

    `[B, T]`: −min(r A, clip(r, 1 − low, 1 + high) A); where A < 0 it is at most −dual · A, so that one exploding ratio
    cannot dominate the step.
    """
    plain = -ratio_BT * advantages_BT
    clipped = -ratio_BT.clamp(1 - clip.low, 1 + clip.high) * advantages_BT
    loss_BT = torch.maximum(plain, clipped)
    if clip.dual is None:
        return loss_BT
    return torch.where(advantages_BT < 0, torch.minimum(loss_BT, -clip.dual * advantages_BT), loss_BT)


def cispo_objective(ratio_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, clip: Clip) -> Tensor:
    """CISPO (MiniMax-M1 2506.13585), `[B, T]`: −sg(min(r, 1 + high)) · A · log π; no token loses its gradient."""
    return -ratio_BT.detach().clamp(max=1 + clip.high) * advantages_BT * logprobs_BT


OBJECTIVES: dict[str, Objective] = {"grpo": clipped_objective, "cispo": cispo_objective}
"""What a stage's `loss` names: a function of ratio, log-probs, advantages (all `[B, T]`) and clip bounds, per token."""


def policy_loss(
    objective: Objective,
    logprobs_BT: Tensor,
    old_BT: Tensor,
    behaviour_BT: Tensor,
    reference_BT: Tensor | None,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    total_tokens: int,
    clip: Clip = DEFAULT_CLIP,
    mismatch_cap: float | None = 2.0,
    kl: tuple[float, Literal["k1", "k2", "k3"]] | None = None,
) -> tuple[Tensor, Metrics]:
    """A policy-gradient loss with token-mean aggregation: Σ mask · (w · objective + β · KL) / total_tokens.

    `old_BT` are the trainer's log-probs before the step's first update (no gradient), `behaviour_BT` the engine's, w
    the weights that correct one for the other, `kl` is (β, estimator) and needs `reference_BT`: a `ValueError` where it
    is missing. An empty mask gives a loss of 0 whose gradient is 0, and what stands at masked places, infinite or not,
    has no effect.
    """
    if kl is not None and reference_BT is None:
        raise ValueError("the loss has a KL term, but the samples have no log-probs of the reference")
    on_BT = mask_BT > 0  # exp() at a masked place may be infinite, and infinity times a mask of 0 is NaN
    logprobs_BT, old_BT, behaviour_BT = (torch.where(on_BT, x, 0.0) for x in (logprobs_BT, old_BT, behaviour_BT))
    advantages_BT = advantages_B[:, None].expand_as(logprobs_BT)
    ratio_BT = (logprobs_BT - old_BT).exp()
    weights_BT = mismatch_weights(old_BT, behaviour_BT, mismatch_cap)
    per_token_BT = weights_BT * objective(ratio_BT, logprobs_BT, advantages_BT, clip)
    gap_BT = (old_BT - behaviour_BT).abs() * mask_BT
    low_BT = (ratio_BT < 1 - clip.low) & (advantages_BT < 0)
    high_BT = (ratio_BT > 1 + clip.high) & (advantages_BT > 0)
    metrics = {"mismatch/mean": gap_BT.sum(), "clip_fraction": ((low_BT | high_BT) * mask_BT).sum()}
    if kl is not None and reference_BT is not None:
        coefficient, estimator = kl
        kl_BT = kl_penalty(logprobs_BT, torch.where(on_BT, reference_BT, 0.0), estimator)
        per_token_BT = per_token_BT + coefficient * kl_BT
        metrics["kl"] = (kl_BT * mask_BT).sum()
    loss = (per_token_BT * mask_BT).sum() / max(total_tokens, 1)
    return loss, {name: value.item() for name, value in metrics.items()}
