"""Losses by hand, against loops written from the papers, and their invariances."""

import math
from typing import Any

import pytest
import torch
from raylign.trainers.online import objectives
from raylign.trainers.online.losses import (
    LossSettings,
    Tokens,
    Totals,
    averaged,
    importance_ratio,
    joined,
    kl_penalty,
    policy_loss,
    preference_loss,
    token_shares,
    value_loss,
)
from raylign.trainers.stages import ALGORITHMS, ClipConfig, MismatchConfig, OnlineStage
from torch.nn.functional import pad

from .terms import LENGTHS, tokens, totals

OF_TOKENS = [name for name, made in ALGORITHMS.items() if made.loss != "preference"]
"""The algorithms whose loss is a sum over tokens; that of pairs is tested against TRL's."""


def of_algorithm(name: str, **fields: Any) -> LossSettings:
    """What a stage of a type makes of its loss, with a KL of 0.05 where the type has it in the loss."""
    rest = {"data": {"path": "x"}, "rewards": [{"type": "format", "pattern": "x"}], "kl": {"coefficient": 0.05}}
    return LossSettings.of(OnlineStage.model_validate({"type": name, **rest, **fields}), 0.05)


def by_loops(t: Tokens, total: int) -> float:
    """Σ min(exp(old − behaviour), 2) · PPO-clip(0.2, 0.28, dual 3) + 0.05 · k3, over completion tokens, / total."""
    loss = 0.0
    for i, length in enumerate(LENGTHS):
        for j in range(length):
            new, old, seen, ref, advantage = (
                x[i, j].item() for x in (t.logprobs_BT, t.old_BT, t.behaviour_BT, t.reference_BT, t.advantages_BT)
            )
            ratio = math.exp(new - old)
            term = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
            if advantage < 0:
                term = min(term, -3 * advantage)
            loss += min(math.exp(old - seen), 2.0) * term + 0.05 * (math.exp(ref - new) - (ref - new) - 1)
    return loss / total


def test_grpo_loss_is_the_papers_sum() -> None:
    t = tokens()
    loss, metrics = policy_loss(t, totals(), of_algorithm("grpo"))
    assert loss.item() == metrics["loss"] == pytest.approx(by_loops(t, 14), abs=1e-12)
    assert metrics["entropy"] == pytest.approx((t.entropy_BT * t.mask_BT).sum().item() / 14)


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if ALGORITHMS[name].loss != "cispo"])
def test_gradient_equals_finite_differences(name: str) -> None:
    """CISPO's is not that of its value: its weights have none."""
    t = tokens()
    settings = of_algorithm(name, clip={"low": 0.2, "high": 0.28})  # bounds that some ratios are within
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(t._replace(logprobs_BT=x), totals(), settings)[0], t.logprobs_BT
    )


@pytest.mark.parametrize("name", OF_TOKENS)
def test_on_policy_the_gradient_is_the_policy_gradient(name: str) -> None:
    t = tokens()
    t = t._replace(old_BT=t.logprobs_BT.detach(), behaviour_BT=t.logprobs_BT.detach())
    settings = of_algorithm(name)._replace(kl=None)
    policy_loss(t, totals(), settings)[0].backward()
    shares = token_shares(t.mask_BT, settings.aggregation, totals())
    if settings.ratio == "product":  # a completion's ratio is the product of its tokens'
        shares = shares * t.mask_BT.sum(-1, keepdim=True)
    assert torch.allclose(t.logprobs_BT.grad, -t.advantages_BT * shares, atol=1e-12)


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_micro_batches_padding_and_order_do_not_change_the_gradient(name: str, bonus: float) -> None:
    t, settings = tokens(), of_algorithm(name, entropy_bonus=bonus)

    def results(parts: list[list[int]], extra: int) -> tuple[torch.Tensor, dict[str, float]]:
        t.logprobs_BT.grad, metrics = None, []
        for rows in parts:
            cut = Tokens(*(pad(x[rows], (0, extra), value=0.7) for x in t))
            cut = cut._replace(mask_BT=pad(t.mask_BT[rows], (0, extra)))
            loss, told = policy_loss(cut, totals(), settings)
            loss.backward()
            metrics.append(told)
        return t.logprobs_BT.grad.clone(), joined(metrics)

    whole, told = results([[0, 1, 2, 3]], 0)
    parts, also_told = results([[2], [3, 0], [1]], 5)
    assert torch.allclose(parts, whole, atol=1e-12)
    assert also_told == pytest.approx(told, abs=1e-12)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_an_empty_mask_gives_zero(name: str) -> None:
    t = tokens()
    t = t._replace(mask_BT=torch.zeros_like(t.mask_BT))
    loss, _ = policy_loss(t, Totals(0, 0, 0), of_algorithm(name, entropy_bonus=0.1))
    loss.backward()
    assert loss.item() == 0
    assert not t.logprobs_BT.grad.any()


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("junk", [1e4, -1e4, math.inf])
def test_what_stands_at_masked_places_has_no_effect(name: str, junk: float) -> None:
    clean = tokens()
    on = clean.mask_BT > 0
    fields = {"old_BT": junk, "behaviour_BT": -junk, "reference_BT": junk, "advantages_BT": junk, "entropy_BT": -junk}
    dirty = {k: torch.where(on, getattr(clean, k), v) for k, v in fields.items()}
    logprobs = torch.where(on, clean.logprobs_BT.detach(), -junk).requires_grad_()
    settings = of_algorithm(name, entropy_bonus=0.1)
    one, told = policy_loss(clean, totals(), settings)
    other, also_told = policy_loss(clean._replace(logprobs_BT=logprobs, **dirty), totals(), settings)
    one.backward()
    other.backward()
    assert told == also_told
    assert torch.equal(clean.logprobs_BT.grad * clean.mask_BT, logprobs.grad)


def test_what_a_loss_needs_and_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no log-probs of the reference"):
        policy_loss(tokens()._replace(reference_BT=None), totals(), LossSettings(kl=(0.05, "k3")))
    with pytest.raises(ValueError, match="no entropies"):
        policy_loss(tokens()._replace(entropy_BT=None), totals(), LossSettings(entropy_bonus=0.1))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 1.0, -1.0),
        (2.0, 1.0, -1.28),  # clipped above
        (0.5, 1.0, -0.5),  # a good sample that became unlikely is not clipped
        (0.5, -1.0, 0.8),  # clipped below
        (2.0, -1.0, 2.0),  # a bad sample that became likely is not clipped …
        (9.0, -1.0, 3.0),  # … until the dual clip
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, expected: float) -> None:
    got = objectives.clipped(torch.tensor([[ratio]]), torch.zeros(1, 1), torch.tensor([[advantage]]), ClipConfig())
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.0, 1.0), (9.0, 1.28)])
def test_cispo_weights_the_gradient_and_never_drops_it(ratio: float, weight: float) -> None:
    logprobs = torch.zeros(1, 1, requires_grad=True)
    ratios = ratio * (logprobs - logprobs.detach()).exp()
    objectives.cispo(ratios, logprobs, torch.tensor([[-2.0]]), ClipConfig()).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(2 * weight)


def test_ratios_by_hand() -> None:
    new, old = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    # log-ratios 0.5 and −1: their sum is −0.5, their mean −0.25; at masked places 1 or the completion's
    for level, expected in {
        "token": [math.exp(0.5), math.exp(-1), 1.0],
        "sequence": [math.exp(-0.25)] * 3,
        "product": [math.exp(-0.5)] * 3,
    }.items():
        assert importance_ratio(new, old, mask, level)[0].tolist() == pytest.approx(expected)


def test_shares_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    given = Totals(tokens=10, sequences=4, constant=32)  # of a step with other micro-batches besides
    for aggregation, expected in {
        "token": [[0.1] * 4, [0.1, 0, 0, 0]],
        "sequence": [[1 / 16] * 4, [1 / 4, 0, 0, 0]],
        "constant": [[1 / 32] * 4, [1 / 32, 0, 0, 0]],
    }.items():
        assert torch.allclose(token_shares(mask, aggregation, given), torch.tensor(expected))


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_kl_estimators_by_hand(estimator: str, expected: float) -> None:
    got = kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), estimator)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_k3_is_unbiased_for_the_kl() -> None:
    torch.manual_seed(1)
    p, q = torch.randn(8).log_softmax(-1), torch.randn(8).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * kl_penalty(p, q, "k3")).sum(), exact, atol=1e-6)


def test_metrics_of_micro_batches_add_up_and_keep_the_largest() -> None:
    assert joined([{"kl": 0.25, "mismatch/max": 3.0}, {"kl": 0.5, "mismatch/max": 1.0}]) == {
        "kl": 0.75,
        "mismatch/max": 3.0,
    }


def test_metrics_of_updates_are_means_over_their_tokens() -> None:
    first, second = {"kl": 0.3, "mismatch/max": 3.0}, {"kl": 0.6, "mismatch/max": 1.0}
    assert averaged([(30, first), (60, second)]) == {"kl": pytest.approx(0.5), "mismatch/max": 3.0}
    assert averaged([(7, first)]) == first


def test_mismatch_off_is_logged_and_corrects_nothing() -> None:
    t = tokens()
    same = t._replace(behaviour_BT=t.old_BT)
    off, metrics = policy_loss(t, totals(), LossSettings(mismatch=None))
    assert off.item() == policy_loss(same, totals(), LossSettings(mismatch=MismatchConfig()))[0].item()
    assert metrics["mismatch/mean"] > 0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_value_losss_gradient_equals_finite_differences(clip: float | None) -> None:
    t = tokens()
    values = t.logprobs_BT.detach().clone().requires_grad_()
    given = (t.old_BT, t.reference_BT, t.mask_BT, clip, totals())
    assert torch.autograd.gradcheck(lambda x: value_loss(x, *given)[0], values)
    loss, metrics = value_loss(values, *given)
    assert loss.item() > 0
    assert bool(metrics["value/clip_fraction"]) == (clip is not None)


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, 0.5, 7.0]], requires_grad=True)
    old, returns = torch.tensor([[1.1, 1.0, 1.0, 7.0]]), torch.tensor([[2.0, 4.0, 0.0, math.inf]])
    mask = torch.tensor([[1.0, 1, 1, 0]])
    # held within 0.2 of old: 1, 1.2, 0.8; squares 1 and 1, 1 and 7.84, 0.25 and 0.64
    loss, metrics = value_loss(values, old, returns, mask, 0.2, Totals(10, 1, 1))
    assert loss.item() == metrics["value/loss"] == pytest.approx(0.5 * (1 + 7.84 + 0.64) / 10)
    assert metrics["value/clip_fraction"] == pytest.approx(0.2)
    loss.backward()
    assert values.grad.tolist() == [[pytest.approx(-0.1), 0.0, 0.0, 0.0]]  # a clipped value has no gradient
    plain, _ = value_loss(values, old, returns, mask, None, Totals(10, 1, 1))
    assert plain.item() == pytest.approx(0.5 * 2.25 / 10)


def test_pairs_whose_mask_is_empty_count_for_nothing_and_shares_add_up() -> None:
    t = tokens()
    whole, told = preference_loss(t, totals()._replace(sequences=2), 0.3)
    halves = [Tokens(*(None if x is None else x[i : i + 2] for x in t)) for i in (0, 2)]
    parts = [preference_loss(half, totals()._replace(sequences=2), 0.3) for half in halves]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), abs=1e-12)
    assert joined([metrics for _, metrics in parts])["preference/margin"] == pytest.approx(told["preference/margin"])
    idle, told = preference_loss(halves[0]._replace(mask_BT=torch.zeros(2, 6)), totals(), 0.3)
    assert idle.item() == told["preference/accuracy"] == told["preference/margin"] == told["mismatch/mean"] == 0
    (gradient,) = torch.autograd.grad(idle, [t.logprobs_BT])
    assert not gradient.any()


def test_pairs_need_a_reference() -> None:
    with pytest.raises(ValueError, match="the loss of pairs needs log-probs of a reference"):
        preference_loss(tokens()._replace(reference_BT=None), totals(), 0.3)
