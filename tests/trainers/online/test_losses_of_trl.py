"""Losses and their gradients equal those of TRL's own trainers, whose code runs here on a stand-in for the trainer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raylign.trainers.online import objectives
from raylign.trainers.online.losses import LossSettings, Tokens, policy_loss, preference_loss
from raylign.trainers.online.mismatch import mismatch_weights
from raylign.trainers.stages import ClipConfig, MismatchConfig

from .terms import MAX_TOKENS, tokens, totals

PPO_CLIP = ClipConfig(high=0.2, dual=None)


def trainer(t: Tokens, **options: Any) -> Any:
    """What `_compute_loss` of TRL's trainers reads of them, with these log-probs as the model's."""
    args = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    fields = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "aux_loss_enabled": False,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
        "max_completion_length": MAX_TOKENS,
        "current_gradient_accumulation_steps": 1,
        "model": SimpleNamespace(training=True),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "accelerator": SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (t.logprobs_BT, t.entropy_BT, None),
    }
    args |= {k: options.pop(k) for k in tuple(options) if k in args}
    fields |= options
    return SimpleNamespace(args=SimpleNamespace(**args), _entropy_bonus_enabled=fields["entropy_coef"] > 0, **fields)


def inputs(t: Tokens) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL's trainers take it."""
    ids = torch.zeros(t.mask_BT.shape, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": t.mask_BT,
        "advantages": t.advantages_BT[:, 0],
        "old_per_token_logps": t.old_BT,
        "old_logps": (t.old_BT * t.mask_BT).sum(1),
        "ref_per_token_logps": t.reference_BT,
        "num_items_in_batch": t.mask_BT.sum(),
    }


def loss_and_gradient(t: Tokens, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    (gradient,) = torch.autograd.grad(loss, [t.logprobs_BT], retain_graph=True)
    return loss.item(), gradient


CASES: dict[str, tuple[dict[str, Any], LossSettings]] = {
    "dapo": ({"loss_type": "dapo"}, LossSettings(clip=ClipConfig(dual=None))),
    "dapo with a dual clip": ({"loss_type": "dapo", "delta": 3.0}, LossSettings()),
    "grpo": ({"loss_type": "grpo"}, LossSettings(aggregation="sequence", clip=ClipConfig(dual=None))),
    "dr_grpo": ({"loss_type": "dr_grpo"}, LossSettings(aggregation="constant", clip=ClipConfig(dual=None))),
    "bnpo": ({"loss_type": "bnpo"}, LossSettings(clip=ClipConfig(dual=None))),  # the step is one micro-batch here
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.25},
        LossSettings(objective=objectives.cispo, clip=ClipConfig(high=0.25)),
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        LossSettings(ratio="sequence", aggregation="sequence", clip=ClipConfig(dual=None)),
    ),
    "kl": (
        {"loss_type": "dapo", "beta": 0.05},
        LossSettings(clip=ClipConfig(dual=None), kl=(0.05, "k3")),
    ),
    "kl by sequence": (
        {"loss_type": "grpo", "beta": 0.05},
        LossSettings(aggregation="sequence", clip=ClipConfig(dual=None), kl=(0.05, "k3")),
    ),
    "gspo with a kl": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.05},
        LossSettings(ratio="sequence", aggregation="sequence", clip=ClipConfig(dual=None), kl=(0.05, "k3")),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_and_gradient_are_those_of_trls_grpo_trainer(case: str, seed: int, corrected: bool) -> None:
    from trl import GRPOTrainer

    options, settings = CASES[case]
    t = tokens(seed)
    rule = MismatchConfig() if corrected else None
    given = inputs(t) | {"importance_sampling_ratio": mismatch_weights(t.old_BT, t.behaviour_BT, t.mask_BT, rule)}
    theirs = loss_and_gradient(t, GRPOTrainer._compute_loss(trainer(t, use_vllm=True, **options), None, given))
    ours = loss_and_gradient(t, policy_loss(t, totals(), settings._replace(mismatch=rule))[0])
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)
    assert ours[1].abs().max() > 1e-3


def test_the_entropy_bonus_is_trls() -> None:
    from trl import GRPOTrainer

    t = tokens()
    t = t._replace(entropy_BT=-t.logprobs_BT * t.logprobs_BT.exp())
    theirs = loss_and_gradient(t, GRPOTrainer._compute_loss(trainer(t, entropy_coef=0.3), None, inputs(t)))
    settings = LossSettings(clip=ClipConfig(dual=None), mismatch=None, entropy_bonus=0.3)
    ours = loss_and_gradient(t, policy_loss(t, totals(), settings)[0])
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_are_those_of_trls_rloo_trainer(seed: int) -> None:
    from trl import RLOOTrainer

    t = tokens(seed)
    theirs = loss_and_gradient(t, RLOOTrainer._compute_loss(trainer(t, epsilon_high=0.2), None, inputs(t)))
    settings = LossSettings(ratio="product", aggregation="sequence", clip=PPO_CLIP, mismatch=None)
    ours = loss_and_gradient(t, policy_loss(t, totals(), settings)[0])
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_of_pairs_are_those_of_trls_dpo_trainer(seed: int) -> None:
    """DPOTrainer and OnlineDPOTrainer, `sigmoid`: rows 0 and 2 are preferred to rows 1 and 3, off policy."""
    t, beta = tokens(seed), 0.3
    assert t.reference_BT is not None
    ratios = (t.logprobs_BT * t.mask_BT).sum(1) - (t.reference_BT * t.mask_BT).sum(1)
    theirs = loss_and_gradient(t, -torch.nn.functional.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).mean())
    loss, metrics = preference_loss(t, totals()._replace(sequences=2), beta)
    ours = loss_and_gradient(t, loss)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-9)
    assert torch.allclose(ours[1], theirs[1], atol=1e-9)
    assert ours[1].abs().max() > 1e-3
    assert metrics["preference/accuracy"] == ((ratios[0::2] > ratios[1::2]) * 1.0).mean().item()
