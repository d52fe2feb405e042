"""The engine's compiled loops against torch's own operations, and the bits of a token in any company."""

import numpy as np
import pytest
import torch
from raylign.rollout.native import kernels
from raylign.rollout.native.attention import Scratch
from raylign.rollout.native.blocks import BLOCK
from raylign.rollout.native.cache import Batch, PagedLayer
from raylign.rollout.native.kernels import as_array
from raylign.rollout.native.memory import HugePages
from torch.nn import functional

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def filled_layer(lengths: list[int], heads: int, size: int, dtype: torch.dtype) -> tuple[PagedLayer, Batch]:
    """A cache whose rows hold `lengths` tokens in scattered blocks, and a batch of every row's last token."""
    torch.manual_seed(0)
    states = torch.randn(1, heads, 1, size).to(dtype)
    per_row = -(-max(lengths) // BLOCK)
    layer = PagedLayer(states, states, len(lengths) * per_row, HugePages())
    tables = np.random.default_rng(0).permutation(len(lengths) * per_row).reshape(len(lengths), -1).astype(np.int32)
    for row, length in enumerate(lengths):
        places = np.arange(length)
        k, v = torch.randn(2, length, heads, size).to(dtype)
        layer.store(k, v, Batch(places, places, places * 0 + row, tables, places * 0 - 1))
    last = np.array(lengths) - 1
    return layer, Batch(last * 0, last, np.arange(len(lengths)), tables, last * 0 - 1)


@DTYPES
@pytest.mark.parametrize(("heads", "shared", "size"), [(2, 1, 8), (1, 3, 20), (2, 2, 64)])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (40, 0.0), (0, 5.0)])
def test_attention_is_torchs_and_a_tokens_bits_are_its_own(
    dtype: torch.dtype, heads: int, shared: int, size: int, window: int, cap: float
):
    layer, batch = filled_layer([1, 7, 31, 32, 33, 70, 100], heads, size, dtype)
    q = torch.randn(7, heads * shared, size)
    scratch = Scratch(128, shared, size, layer.values.shape[3])
    got = layer.attend_on_cpu(q, batch, 0.3, window, cap, scratch)
    for row, last in enumerate(batch.positions):
        end, begin = last + 1, max(0, last + 1 - window) if window else 0
        flat = layer.keys[batch.tables[row]].permute(1, 0, 3, 2).flatten(1, 2)[:, begin:end].float()
        values = layer.values[batch.tables[row]][..., :size].permute(1, 0, 2, 3).flatten(1, 2)[:, begin:end].float()
        wanted = q[row].view(heads, shared, size) @ flat.mT * 0.3
        wanted = cap * torch.tanh(wanted / cap) if cap else wanted
        assert torch.allclose(got[row], (wanted.softmax(-1) @ values).flatten(0, 1), atol=1e-5)
    some = Batch(batch.tokens[2:5], batch.positions[2:5], batch.rows[2:5], batch.tables, batch.adapters[2:5])
    assert torch.equal(layer.attend_on_cpu(q[2:5], some, 0.3, window, cap, scratch), got[2:5])


def test_what_lies_beyond_a_rows_end_is_never_read():
    layer, batch = filled_layer([5, 40], 2, 8, torch.float32)
    q = torch.randn(2, 2, 8)
    scratch = Scratch(64, 1, 8, layer.values.shape[3])
    before = layer.attend_on_cpu(q, batch, 1.0, 0, 0.0, scratch)
    layer.keys[batch.tables[0, 0], :, :, 5:] = float("nan")
    layer.values[batch.tables[0, 0], :, 5:] = float("nan")
    assert torch.equal(layer.attend_on_cpu(q, batch, 1.0, 0, 0.0, scratch), before)


@DTYPES
def test_norms_are_torchs(dtype: torch.dtype):
    torch.manual_seed(1)
    x, update, weight = torch.randn(9, 50).to(dtype), torch.randn(9, 50).to(dtype), torch.randn(50).to(dtype)
    out = torch.empty_like(x)
    eps = np.float32(1e-5)
    kernels.rms_norm(as_array(x), as_array(weight), np.float32(1), eps, as_array(out))
    wanted = functional.rms_norm(x.float(), (50,), eps=1e-5) * (1 + weight.float())
    assert torch.allclose(out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    total = x + update
    kernels.add_and_norm(as_array(x), as_array(update), as_array(weight), eps, as_array(out))
    assert torch.equal(x, total)
    wanted = functional.rms_norm(total.float(), (50,), weight.float(), 1e-5)
    assert torch.allclose(out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
def test_swiglu_is_torchs_at_any_size_of_its_numbers(dtype: torch.dtype):
    gate = torch.tensor([-1e4, -90.0, -20.0, -1.0, -0.0, 0.0, 0.3, 5.0, 88.0, 1e4]).to(dtype)
    up = torch.linspace(-2, 2, 10).to(dtype)
    wanted = functional.silu(gate.float()) * up.float()
    kernels.silu_multiply(as_array(gate), as_array(up))
    assert torch.allclose(gate.float(), wanted, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("bits", [0x3F800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x80000001])
def test_bfloat16_is_rounded_as_torch_rounds(bits: int):
    number = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    x, zero = number.view(1, 1).clone(), torch.zeros(1, 1, dtype=torch.bfloat16)
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    weight = np.ones(1, np.float32)
    x16 = zero.clone()
    kernels.add_and_norm(as_array(x16), x.numpy(), weight, np.float32(1), as_array(out))
    assert torch.equal(x16[0].view(torch.uint16), number.to(torch.bfloat16).view(torch.uint16)) or number.isnan()
    assert x16.isnan().item() == number.isnan().item()
