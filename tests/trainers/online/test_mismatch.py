"""Correction of the gap between trainer and engine, by hand."""

import math

import pytest
import torch
from raylign.trainers.online.losses import LossSettings, Tokens, Totals, policy_loss
from raylign.trainers.online.mismatch import mismatch_metrics, mismatch_weights
from raylign.trainers.stages import ClipConfig, MismatchConfig

OLD = torch.tensor([[0.0, 1.0, -1.0, 9.0], [0.25, 0.25, 9.0, 9.0]], requires_grad=True)
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
E = math.e


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, [[1, 1, 1], [1, 1]]),
        ({}, [[1, 2, 1 / E], [E**0.25, E**0.25]]),
        ({"low": 0.5}, [[1, 2, 0.5], [E**0.25, E**0.25]]),
        ({"action": "mask", "low": 0.5, "high": 5}, [[1, E, 0], [E**0.25, E**0.25]]),
        # log-ratios of the completions: 0 and 0.5
        ({"level": "sequence", "high": 1.5}, [[1, 1, 1], [1.5, 1.5]]),
        ({"level": "sequence", "action": "mask", "high": 1.5}, [[1, 1, 1], [0, 0]]),
    ],
)
def test_weights_by_hand(rule: dict[str, object] | None, expected: list[list[float]]) -> None:
    config = None if rule is None else MismatchConfig.model_validate(rule)
    weights = mismatch_weights(OLD, torch.zeros(2, 4), MASK, config)
    assert not weights.requires_grad
    assert weights[0, :3].tolist() == pytest.approx(expected[0])
    assert weights[1, :2].tolist() == pytest.approx(expected[1])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action", ["truncate", "mask"])
@pytest.mark.parametrize("low", [None, 0.7])
def test_weights_are_trls(level: str, action: str, low: float | None) -> None:
    """GRPOTrainer's `vllm_importance_sampling_ratio` in its four modes, with `clip_min` and `clip_max`."""
    torch.manual_seed(0)
    old, behaviour = torch.randn(5, 7).double() * 0.2, torch.randn(5, 7).double() * 0.2
    mask = (torch.arange(7)[None] < torch.tensor([7, 1, 3, 5, 2])[:, None]).double()
    difference = (old - behaviour) * mask
    ratio = torch.exp(difference.sum(-1, keepdim=True) if level == "sequence" else difference)
    if action == "truncate":
        expected = torch.clamp(ratio, min=low, max=1.3)
    else:
        expected = ratio.masked_fill((ratio < (-math.inf if low is None else low)) | (ratio > 1.3), value=0.0)
    rule = MismatchConfig.model_validate({"level": level, "action": action, "low": low, "high": 1.3})
    assert torch.allclose(mismatch_weights(old, behaviour, mask, rule) * mask, expected * mask, atol=1e-12)
    assert expected.unique().numel() > 1


def test_a_long_completion_far_off_is_bounded() -> None:
    far = torch.full((1, 4000), 1.0)
    for action, expected in (("truncate", 2.0), ("mask", 0.0)):
        rule = MismatchConfig.model_validate({"level": "sequence", "action": action})
        assert mismatch_weights(far, torch.zeros(1, 4000), torch.ones(1, 4000), rule).unique().tolist() == [expected]


def test_metrics_by_hand() -> None:
    weights = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]])
    told = mismatch_metrics(OLD, torch.zeros(2, 4), weights, MASK, total_tokens=10)
    assert told["mismatch/mean"] == pytest.approx(2.5 / 10)
    assert told["mismatch/max"] == 1.0
    assert told["mismatch/masked"] == pytest.approx(1 / 10)
    kl = (E - 2) + 1 / E + 2 * (E**0.25 - 1.25)
    assert told["mismatch/kl"] == pytest.approx(kl / 10)


def test_the_kl_is_that_of_engine_and_trainer() -> None:
    """The estimate's expectation over the engine's tokens."""
    torch.manual_seed(1)
    engine, trainer = torch.randn(8).double().log_softmax(-1), torch.randn(8).double().log_softmax(-1)
    exact = (engine.exp() * (engine - trainer)).sum().item()
    expectation = 0.0
    for p, behaviour, old in zip(engine.exp().tolist(), engine, trainer, strict=True):
        one = torch.ones(1, 1)
        told = mismatch_metrics(old.reshape(1, 1), behaviour.reshape(1, 1), one, one, total_tokens=1)
        expectation += p * told["mismatch/kl"]
    assert expectation == pytest.approx(exact, abs=1e-9)


def test_of_older_weights_the_loss_and_its_gradient_are_areals_decoupled_ones() -> None:
    """2505.24298, section 5.2: E[π_prox / π_behav · min(u A, clip(u, 1 − ε, 1 + ε) A)], u = π_θ / π_prox."""
    generator = torch.Generator().manual_seed(2)
    behaviour_BT = -torch.rand(3, 5, generator=generator, dtype=torch.float64) - 0.1
    proximal_BT = behaviour_BT + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    logprobs_BT = (proximal_BT + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages_BT = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mask_BT = torch.ones(3, 5, dtype=torch.float64)

    ratio_BT = (logprobs_BT - proximal_BT).exp()
    least_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(0.8, 1.2) * advantages_BT)
    expected = -((proximal_BT - behaviour_BT).exp() * least_BT).mean()
    (gradient,) = torch.autograd.grad(expected, logprobs_BT)

    settings = LossSettings(clip=ClipConfig(low=0.2, high=0.2, dual=None), mismatch=MismatchConfig(high=1e9))
    tokens = Tokens(logprobs_BT, proximal_BT, behaviour_BT, advantages_BT, mask_BT)
    loss, _ = policy_loss(tokens, Totals(15, 3, 15), settings)
    (ours,) = torch.autograd.grad(loss, logprobs_BT)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(ours, gradient, atol=1e-9, rtol=0)
