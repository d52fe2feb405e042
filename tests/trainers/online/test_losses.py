"""Losses by hand, against loops written from the papers, and their invariances."""

import math

import pytest
import torch
from raylign.trainers.online.losses import (
    OBJECTIVES,
    Clip,
    clipped_objective,
    kl_penalty,
    mismatch_weights,
    policy_loss,
    token_logprobs,
)


def batch(B: int = 4, T: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([6, 3, 1, 4])[:B]
    return {
        "logprobs_BT": -torch.rand(B, T, dtype=torch.float64) * 2,
        "old_BT": -torch.rand(B, T, dtype=torch.float64) * 2,
        "behaviour_BT": -torch.rand(B, T, dtype=torch.float64) * 2,
        "reference_BT": -torch.rand(B, T, dtype=torch.float64) * 2,
        "advantages_B": torch.randn(B, dtype=torch.float64),
        "mask_BT": (torch.arange(T)[None] < lengths[:, None]).double(),
    }


def by_loops(b: dict[str, torch.Tensor], total: int) -> float:
    """Σ min(exp(old − behaviour), 2) · PPO-clip(0.2, 0.28, dual 3) + 0.05 · k3, over completion tokens, / total."""
    loss = 0.0
    for i, advantage in enumerate(b["advantages_B"].tolist()):
        for t in range(b["mask_BT"].shape[1]):
            if not b["mask_BT"][i, t]:
                continue
            new, old, seen, ref = (b[k][i, t].item() for k in ("logprobs_BT", "old_BT", "behaviour_BT", "reference_BT"))
            ratio = math.exp(new - old)
            term = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
            if advantage < 0:
                term = min(term, -3 * advantage)
            loss += min(math.exp(old - seen), 2.0) * term + 0.05 * (math.exp(ref - new) - (ref - new) - 1)
    return loss / total


def test_grpo_loss_is_the_papers_sum() -> None:
    b = batch()
    loss, metrics = policy_loss(clipped_objective, **b, total_tokens=14, kl=(0.05, "k3"))
    assert loss.item() == pytest.approx(by_loops(b, 14), abs=1e-12)
    gap = ((b["old_BT"] - b["behaviour_BT"]).abs() * b["mask_BT"]).sum()
    assert metrics["mismatch/mean"] == pytest.approx(gap.item())


def test_gradient_equals_finite_differences() -> None:
    b = batch(2, 3)
    rest = {k: v for k, v in b.items() if k != "logprobs_BT"}
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(clipped_objective, x, **rest, total_tokens=6, kl=(0.1, "k3"))[0],
        b["logprobs_BT"].requires_grad_(),
    )


def test_on_policy_gradient_is_minus_the_advantage_per_token() -> None:
    logprobs = torch.zeros(2, 3, requires_grad=True)
    advantages, mask = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    loss, _ = policy_loss(
        clipped_objective, logprobs, logprobs.detach(), logprobs.detach(), None, advantages, mask, total_tokens=5
    )
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([[-2.0, -2, 0], [1, 1, 1]]) / 5)


def test_micro_batches_padding_and_order_do_not_change_the_gradient() -> None:
    b = batch()
    weights = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def gradient(parts: list[list[int]], extra: int) -> torch.Tensor:
        weights.grad = None
        for rows in parts:
            cut = {k: v[rows] for k, v in b.items()}
            pad = {k: torch.nn.functional.pad(v, (0, extra), value=0.7) for k, v in cut.items() if v.ndim == 2}
            pad["mask_BT"] = torch.nn.functional.pad(cut["mask_BT"], (0, extra))
            scale = torch.nn.functional.pad(weights, (0, extra))
            pad["logprobs_BT"] = pad["logprobs_BT"] + scale
            policy_loss(clipped_objective, **pad, advantages_B=cut["advantages_B"], total_tokens=14, kl=(0.05, "k3"))[
                0
            ].backward()
        return weights.grad

    whole = gradient([[0, 1, 2, 3]], 0).clone()
    assert torch.allclose(gradient([[2], [3, 0], [1]], 5), whole, atol=1e-12)


def test_an_empty_mask_gives_zero() -> None:
    b = batch() | {"mask_BT": torch.zeros(4, 6, dtype=torch.float64)}
    b["logprobs_BT"].requires_grad_()
    loss, _ = policy_loss(clipped_objective, **b, total_tokens=0, kl=(0.05, "k3"))
    loss.backward()
    assert loss.item() == 0
    assert not b["logprobs_BT"].grad.any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("junk", [1e4, -1e4, math.inf])
def test_what_stands_at_masked_places_has_no_effect(name: str, junk: float) -> None:
    clean, dirty = batch(), batch()
    for key, sign in (("logprobs_BT", -1), ("old_BT", 1), ("behaviour_BT", -1), ("reference_BT", 1)):
        dirty[key] = torch.where(dirty["mask_BT"] > 0, dirty[key], sign * junk)
    results = []
    for b in (clean, dirty):
        b["logprobs_BT"].requires_grad_()
        loss, metrics = policy_loss(OBJECTIVES[name], **b, total_tokens=14, kl=(0.05, "k3"))
        loss.backward()
        results.append((loss.item(), metrics, b["logprobs_BT"].grad * b["mask_BT"], b["logprobs_BT"].grad))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][3])


def test_a_kl_without_a_reference_is_an_error() -> None:
    b = batch() | {"reference_BT": None}
    with pytest.raises(ValueError, match="no log-probs of the reference"):
        policy_loss(clipped_objective, **b, total_tokens=14, kl=(0.05, "k3"))


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
    got = clipped_objective(torch.tensor([[ratio]]), torch.zeros(1, 1), torch.tensor([[advantage]]), Clip())
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.0, 1.0), (9.0, 1.28)])
def test_cispo_weights_the_gradient_and_never_drops_it(ratio: float, weight: float) -> None:
    logprobs = torch.zeros(1, 1, requires_grad=True)
    ratios = ratio * (logprobs - logprobs.detach()).exp()
    OBJECTIVES["cispo"](ratios, logprobs, torch.tensor([[-2.0]]), Clip()).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(2 * weight)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_all_objectives_have_the_policy_gradient(name: str) -> None:
    logprobs = torch.randn(2, 3, requires_grad=True)
    advantages, mask = torch.tensor([2.0, -1.0]), torch.ones(2, 3)
    old = logprobs.detach()
    policy_loss(OBJECTIVES[name], logprobs, old, old, None, advantages, mask, total_tokens=6)[0].backward()
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, -advantages[:, None].expand(2, 3) / 6)


def test_every_loss_a_recipe_may_name_is_there() -> None:
    from typing import get_args

    from raylign.trainers.stages import OnlineStage

    assert set(get_args(OnlineStage.model_fields["loss"].annotation)) == set(OBJECTIVES)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_kl_estimators_by_hand(estimator: str, expected: float) -> None:
    got = kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), estimator)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_k3_is_unbiased_for_the_kl() -> None:
    torch.manual_seed(1)
    p, q = torch.randn(8).log_softmax(-1), torch.randn(8).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * kl_penalty(p, q, "k3")).sum(), exact, atol=1e-6)


def test_mismatch_weights_are_truncated_and_carry_no_gradient() -> None:
    old = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    weights = mismatch_weights(old, torch.zeros(1, 3), 2.0)
    assert torch.allclose(weights, torch.tensor([[1.0, 2.0, math.exp(-1)]]))
    assert not weights.requires_grad
    assert mismatch_weights(old, torch.zeros(1, 3), None).tolist() == [[1, 1, 1]]


def test_token_logprobs_mirror_the_temperature() -> None:
    logits = torch.tensor([[[2.0, 0.0]]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([[0]]), 2.0)
    p = 1 / (1 + math.exp(-1))
    assert logprobs.item() == pytest.approx(math.log(p))
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
