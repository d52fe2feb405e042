"""Log-probs from hidden states: values and gradients are those of plain logits, however they are cut into chunks."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from raylign.trainers.online import head as module
from raylign.trainers.online.head import Head, token_logprobs
from raylign.trainers.online.losses import LossSettings, Tokens, Totals, policy_loss
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
CONFIGS = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "scaled": CohereConfig(**SHAPE, logit_scale=0.25),
    "divided": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "bounded": Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
}


def as_they_are(logits: Tensor) -> tuple[Tensor, Head]:
    """Logits as hidden states under a head that changes nothing."""
    return logits, Head(lambda hidden: hidden, [], logits.shape[-1])


def plainly(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same with everything in memory and autograd's own gradients."""
    logp_NV = (logits_NV / temperature).log_softmax(-1)
    return logp_NV.gather(-1, tokens_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def test_log_probs_mirror_the_temperature() -> None:
    hidden, head = as_they_are(torch.tensor([[2.0, 0.0]]))
    logprobs, entropy = token_logprobs(hidden, torch.tensor([0]), head, 2.0)
    p = 1 / (1 + math.exp(-1))
    assert logprobs.item() == pytest.approx(math.log(p))
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_the_entropy_bonus_raises_the_entropy() -> None:
    logits, head = as_they_are(torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True))
    for wanted in (False, True):
        logprobs, entropy = token_logprobs(logits, torch.tensor([0]), head, 1.0, entropy_gradient=wanted)
        assert logprobs.requires_grad
        assert entropy.requires_grad == wanted
    new = logprobs.detach()[None]
    t = Tokens(new, new, new, torch.zeros(1, 1), torch.ones(1, 1), entropy_BT=entropy[None])
    loss, _ = policy_loss(t, Totals(1, 1, 1), LossSettings(entropy_bonus=0.5))
    assert loss.item() == pytest.approx(-0.5 * entropy.item())
    loss.backward()
    p = logits.detach().softmax(-1)
    # dH/dz = −p (log p + H)
    assert torch.allclose(logits.grad, 0.5 * p * (p.log() + entropy.detach()[:, None]), atol=1e-6)


@pytest.mark.parametrize("chunk_logits", [1, 33, 1000], ids=lambda n: f"{max(1, n // 11)}-tokens-a-chunk")
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_models_own_logits(
    name: str, adapted: bool, entropy_gradient: bool, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers below the head, and of the head itself: all of its weights, or an adapter's."""
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    if adapted:
        lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora).get_base_model()
    ids, tokens = torch.randint(1, 11, (2, 5)), torch.randint(1, 11, (10,))
    weights = torch.randn(2, 10)

    def gradient(logprobs_N: Tensor, entropy_N: Tensor) -> Tensor:
        of_entropy = (entropy_N * weights[1]).sum() if entropy_gradient else 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = torch.autograd.grad((logprobs_N * weights[0]).sum() + of_entropy, trained)
        return torch.cat([part.flatten() for part in parts])

    expected = plainly(model(input_ids=ids).logits.flatten(0, 1), tokens, 0.7)
    hidden_ND = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    got = token_logprobs(hidden_ND, tokens, Head.of(model), 0.7, entropy_gradient=entropy_gradient)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    theirs = gradient(*expected)
    assert (gradient(*got) - theirs).norm() <= 1e-6 * theirs.norm()


def test_gradients_equal_finite_differences_of_what_is_differentiable() -> None:
    layer = nn.Linear(4, 6)
    head = Head(layer, list(layer.parameters()), 6)
    hidden, tokens = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 5, 2])
    torch.autograd.gradcheck(
        lambda x: token_logprobs(x, tokens, head, 1.3, entropy_gradient=True), hidden, eps=1e-2, atol=2e-3
    )


def test_nothing_of_the_vocabularys_size_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []
    layer = nn.Linear(4, 5000, bias=False)
    hidden = torch.randn(20, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_logprobs(hidden, torch.arange(20), Head(layer, [layer.weight], 5000), 1.0)
    assert sum(t.numel() for t in kept if t is not layer.weight) <= 4 * 20 * 4 + 20 * 5000, "those of one chunk at most"


def test_without_gradients_none_are_made() -> None:
    layer = nn.Linear(4, 6)
    with torch.no_grad():
        logprobs, _ = token_logprobs(torch.randn(3, 4), torch.arange(3), Head(layer, list(layer.parameters()), 6), 1.0)
    assert not logprobs.requires_grad
