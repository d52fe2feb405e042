"""The engine's linear layer: packed weights, and every token's own adapter."""

import numpy as np
import pytest
import torch
from raylign.rollout.native.linear import EngineLinear, Shared
from torch import nn
from transformers.pytorch_utils import Conv1D


def layer_and_shared(layer: nn.Module, dtype: torch.dtype) -> tuple[EngineLinear, Shared]:
    shared = Shared()
    return EngineLinear(layer.to(dtype).requires_grad_(False), shared), shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), Conv1D(24, 40)])
def test_it_computes_what_the_layer_does_and_follows_its_weights(layer: nn.Module, dtype: torch.dtype):
    engine, _ = layer_and_shared(layer, dtype)
    x = torch.randn(2, 5, 40).to(dtype)
    assert torch.allclose(engine(x), layer(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    with torch.no_grad():
        layer.weight.mul_(2)
    engine.pack()
    assert torch.allclose(engine(x), layer(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_every_token_gets_its_own_adapter_and_the_others_none():
    torch.manual_seed(0)
    engine, shared = layer_and_shared(nn.Linear(40, 24), torch.float32)
    factors = {n: (torch.randn(r, 40), torch.randn(24, r)) for n, r in ((0, 16), (2, 32), (5, 16))}
    for number, (a, b) in factors.items():
        engine.put(number, a, b)
    engine.remove(3)
    x = torch.randn(8, 40)
    plain = engine(x)
    shared.adapters = np.array([-1, 0, 2, 5, 3, 1, 0, -1])
    wanted = [x[t] @ factors[n][0].T @ factors[n][1].T if n in factors else 0 for t, n in enumerate(shared.adapters)]
    got = engine(x)
    assert torch.allclose(got - plain, torch.stack([torch.zeros(24) + w for w in wanted]), atol=1e-3)
    assert torch.equal(got[[0, 4, 5, 7]], plain[[0, 4, 5, 7]])
    engine.remove(2)
    assert torch.equal(engine(x)[2], plain[2])
    engine.put(2, *factors[0])
    shared.adapters = np.array([0, 2] * 4)
    again = engine(x)
    shared.adapters = np.array([2, 0] * 4)
    assert torch.equal(engine(x), again)


def test_a_released_layer_keeps_its_shape_and_takes_new_weights():
    engine, _ = layer_and_shared(nn.Linear(40, 24), torch.float32)
    x = torch.randn(3, 40)
    before = engine(x)
    assert engine.release()
    assert engine.weight.is_meta
    assert engine.weight.shape == (24, 40)
    assert torch.equal(engine(x), before)
    new = nn.Linear(40, 24, bias=False)
    engine.pack(new.weight.detach())
    engine.bias.zero_()
    engine.take_bias()
    assert torch.allclose(engine(x), new(x), atol=1e-5)
