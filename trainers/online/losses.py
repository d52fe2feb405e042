"""Policy losses and what they are made of: tensors in, `(loss, metrics)` out.

Shapes: B samples, T completion positions. Losses are sums divided by `Totals` of the whole optimizer
step: so a gradient does not depend on how a step is cut into micro-batches or spread over ranks. Metrics are shares of
the step's, to be added up; `joined` does.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..stages import Aggregation, ClipConfig, Estimator, MismatchConfig, OnlineStage, Ratio
from . import objectives
from .mismatch import mismatch_metrics, mismatch_weights
from .objectives import Objective

Metrics = dict[str, float]


class Tokens(NamedTuple):
    """A micro-batch as a loss sees it, all `[B, T]`."""

    logprobs_BT: Tensor
    old_BT: Tensor
    """The trainer's log-probs before the step's first update (no gradient)."""
    behaviour_BT: Tensor
    """The engine's log-probs."""
    advantages_BT: Tensor
    mask_BT: Tensor
    """1 where a completion token stands."""
    reference_BT: Tensor | None = None
    entropy_BT: Tensor | None = None


class Totals(NamedTuple):
    """What an optimizer step has in all its micro-batches and ranks, and of samples that no micro-batch has because
    they move nothing."""

    tokens: int
    sequences: int
    constant: int
    """Samples of an update times the longest completion allowed, whatever came."""
    computed: int | None = None
    """The tokens that micro-batches do have, over which metrics are means; None for all."""

    @property
    def seen(self) -> int:
        """What a mean over the tokens of all micro-batches is divided by."""
        return max(self.tokens if self.computed is None else self.computed, 1)


class LossSettings(NamedTuple):
    """How terms are made and added up; `kl` is (coefficient, estimator) and needs the reference's log-probs."""

    objective: Objective = objectives.clipped
    ratio: Ratio = "token"
    aggregation: Aggregation = "token"
    clip: ClipConfig = ClipConfig()
    mismatch: MismatchConfig | None = MismatchConfig()
    kl: tuple[float, Estimator] | None = None
    entropy_bonus: float = 0.0

    @classmethod
    def of(cls, stage: OnlineStage, kl_coefficient: float) -> "LossSettings":
        """Those that a recipe asks for, with the KL's coefficient of the step."""
        kl = stage.kl if stage.kl and stage.kl.place == "loss" else None
        return cls(
            objective=getattr(objectives, stage.loss),
            ratio=stage.ratio,
            aggregation=stage.aggregation,
            clip=stage.clip,
            mismatch=stage.mismatch,
            kl=(kl_coefficient, kl.estimator) if kl else None,
            entropy_bonus=stage.entropy_bonus,
        )


def kl_penalty(logprobs_BT: Tensor, reference_BT: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) on the policy's own samples (Schulman 2020), `[B, T]`.

    With d = log π_ref − log π: k1 = −d, k2 = d²/2, k3 = e^d − d − 1.
    """
    d = reference_BT - logprobs_BT
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.exp() - d - 1


def importance_ratio(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor, level: Ratio) -> Tensor:
    """π / π_old, `[B, T]`: of each token; or of the completion, the same at all its tokens.

    `sequence` is the geometric mean over its tokens (GSPO 2507.18071), `product` the ratio of its probabilities.
    """
    gap_BT = (logprobs_BT - old_BT) * mask_BT
    if level == "token":
        return gap_BT.exp()
    length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1) if level == "sequence" else 1
    return (gap_BT.sum(-1, keepdim=True) / length_B1).exp().expand_as(gap_BT)


def token_shares(mask_BT: Tensor, aggregation: Aggregation, totals: Totals) -> Tensor:
    """What each token's term counts in the step's loss, `[B, T]`; 0 where the mask is.

    `token`: 1 / tokens (DAPO 2503.14476). `sequence`: 1 / (its completion's tokens · sequences) (GRPO 2402.03300).
    `constant`: 1 / constant (Dr.GRPO 2503.20783).
    """
    if aggregation == "token":
        return mask_BT / max(totals.tokens, 1)
    if aggregation == "constant":
        return mask_BT / max(totals.constant, 1)
    return mask_BT / (mask_BT.sum(-1, keepdim=True).clamp(min=1) * max(totals.sequences, 1))


def policy_loss(given: Tokens, totals: Totals, settings: LossSettings) -> tuple[Tensor, Metrics]:
    """A micro-batch's part of the step's loss: Σ share · (w · objective + β · KL) − η · mean entropy.

    w are the weights that correct the engine's arithmetic, shares those of the aggregation; means, the entropy's among
    them, are over all tokens that are computed. Raises `ValueError` where a KL is asked for and there is no reference,
    or an entropy bonus without entropies. An empty mask gives a loss of 0 whose gradient is 0, and what stands at
    masked places, infinite or not, has no effect.
    """
    t, clip = _without_masked(given), settings.clip
    ratio_BT = importance_ratio(t.logprobs_BT, t.old_BT, t.mask_BT, settings.ratio)
    weights_BT = mismatch_weights(t.old_BT, t.behaviour_BT, t.mask_BT, settings.mismatch)
    terms_BT = weights_BT * settings.objective(ratio_BT, t.logprobs_BT, t.advantages_BT, clip)
    metrics = mismatch_metrics(t.old_BT, t.behaviour_BT, weights_BT, t.mask_BT, totals.seen)

    def mean(x_BT: Tensor) -> Tensor:
        return (x_BT * t.mask_BT).sum() / totals.seen

    low_BT = (ratio_BT < 1 - clip.low) & (t.advantages_BT < 0)
    high_BT = (ratio_BT > 1 + clip.high) & (t.advantages_BT > 0)
    metrics["clip_fraction"] = mean(low_BT | high_BT).item()
    if settings.kl is not None:
        if t.reference_BT is None:
            raise ValueError("the loss has a KL term, but the samples have no log-probs of the reference")
        coefficient, estimator = settings.kl
        kl_BT = kl_penalty(t.logprobs_BT, t.reference_BT, estimator)
        terms_BT = terms_BT + coefficient * kl_BT
        metrics["kl"] = mean(kl_BT).item()
    loss = (terms_BT * token_shares(t.mask_BT, settings.aggregation, totals)).sum()
    if t.entropy_BT is not None:
        metrics["entropy"] = mean(t.entropy_BT).item()
    if settings.entropy_bonus:
        if t.entropy_BT is None:
            raise ValueError("the loss has an entropy bonus, but no entropies")
        loss = loss - settings.entropy_bonus * mean(t.entropy_BT)
    return loss, metrics | {"loss": loss.item()}


def preference_loss(given: Tokens, totals: Totals, beta: float) -> tuple[Tensor, Metrics]:
    """A micro-batch's part of DPO's loss (2305.18290, equation 7): Σ −log σ(β (Δ chosen − Δ rejected)) / pairs.

    Δ is Σ_t log π − log π_ref of a completion. Rows alternate, chosen and rejected; `totals.sequences` counts pairs,
    and one whose mask is empty counts for nothing. Metrics: the share of pairs told apart, their mean margin
    β (Δ − Δ′), and the mismatch on what an engine drew (`behaviour_BT` is NaN where none did). Raises `ValueError`
    without the reference's log-probs.
    """
    if given.reference_BT is None:
        raise ValueError("the loss of pairs needs log-probs of a reference")
    drawn_BT = given.mask_BT * ~given.behaviour_BT.isnan()
    t = _without_masked(given._replace(behaviour_BT=given.behaviour_BT.nan_to_num()))
    assert t.reference_BT is not None
    ratio_B = ((t.logprobs_BT - t.reference_BT) * t.mask_BT).sum(-1)
    margin_P = beta * (ratio_B[0::2] - ratio_B[1::2])
    pairs = max(totals.sequences, 1)
    there_P = t.mask_BT[0::2].amax(-1) > 0
    loss = -(torch.nn.functional.logsigmoid(margin_P) * there_P).sum() / pairs
    metrics = mismatch_metrics(t.old_BT, t.behaviour_BT, torch.ones_like(drawn_BT), drawn_BT, totals.tokens)
    metrics["preference/accuracy"] = (margin_P > 0).sum().item() / pairs
    metrics["preference/margin"] = margin_P.sum().item() / pairs
    if t.entropy_BT is not None:
        metrics["entropy"] = (t.entropy_BT * t.mask_BT).sum().item() / max(totals.tokens, 1)
    return loss, metrics | {"loss": loss.item()}


def value_loss(
    values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None, totals: Totals
) -> tuple[Tensor, Metrics]:
    """A critic's part of the step's loss, PPO's clipped one (1707.06347): Σ ½ max((V − R)², (V′ − R)²) / tokens.

    V′ is V held within `clip` of the values before the step's first update; without a clip there is no second term.
    """
    on_BT = mask_BT > 0
    values_BT, old_BT, returns_BT = (torch.where(on_BT, x, 0.0) for x in (values_BT, old_BT, returns_BT))
    plain_BT = (values_BT - returns_BT).square()
    terms_BT = plain_BT
    if clip is not None:
        held_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
        terms_BT = torch.maximum(plain_BT, (held_BT - returns_BT).square())
    loss = 0.5 * terms_BT.sum() / max(totals.tokens, 1)
    clipped = (terms_BT > plain_BT).sum().item() / max(totals.tokens, 1)
    return loss, {"value/loss": loss.item(), "value/clip_fraction": clipped}


def joined(parts: Iterable[Metrics]) -> Metrics:
    """The metrics of a step from those of its micro-batches: shares added up, the largest of what ends in `/max`."""
    whole: Metrics = {}
    for part in parts:
        for name, value in part.items():
            before = whole.get(name, 0.0)
            whole[name] = max(before, value) if name.endswith("/max") else before + value
    return whole


def averaged(parts: Sequence[tuple[int, Metrics]]) -> Metrics:
    """The metrics of a step from those of its updates, with their tokens: means over all tokens of all updates, and the
    largest of what ends in `/max`. Of a single update they are its own, bit for bit."""
    total = max(sum(tokens for tokens, _ in parts), 1)
    shares = [
        {name: value if name.endswith("/max") else value * (tokens / total) for name, value in metrics.items()}
        for tokens, metrics in parts
    ]
    return joined(shares)


def _without_masked(t: Tokens) -> Tokens:
    """Zeros at masked places: exp() there may be infinite, and infinity times a mask of 0 is NaN."""
    on_BT = t.mask_BT > 0

    def clean(x_BT: Tensor) -> Tensor:
        return torch.where(on_BT, x_BT, 0.0)

    return Tokens(
        logprobs_BT=clean(t.logprobs_BT),
        old_BT=clean(t.old_BT),
        behaviour_BT=clean(t.behaviour_BT),
        advantages_BT=clean(t.advantages_BT),
        mask_BT=t.mask_BT,
        reference_BT=None if t.reference_BT is None else clean(t.reference_BT),
        entropy_BT=None if t.entropy_BT is None else clean(t.entropy_BT),
    )
