"""QLoRA on a CPU: a base in NF4 computes with the values it stands for, in an eighth of the memory."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from raylign.cluster.errors import InputError
from raylign.trainers.adapters import export_weights, open_base, open_model
from raylign.trainers.online.policy import Policy
from raylign.trainers.online.prefixes import Packing
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.scoring_model import logprobs_of
from raylign.trainers.stages import LoraConfig, RewardModelStage

from .online.rank_process import samples, spec

LORA, NF4 = LoraConfig(r=4), LoraConfig(r=4, quantize="nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_computes_with_the_values_it_stands_for(tiny_model: Path, dtype: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    quantised, stands_for = open_base(tiny_model, dtype=dtype, quantize="nf4"), open_base(tiny_model, dtype=dtype)
    plain, packed = dict(stands_for.named_parameters()), dict(quantised.named_parameters())
    linear = [name for name, weight in packed.items() if weight.numel() != plain[name].numel()]
    assert len(linear) == 14  # seven of each layer; embedding and norms stay
    with torch.no_grad():
        for name in linear:
            plain[name].copy_(functional.dequantize_4bit(packed[name], packed[name].quant_state))
            assert packed[name].dtype == getattr(torch, dtype)
            assert packed[name].nbytes * 8 == plain[name].numel() * 4
    models = (quantised.eval(), stands_for.eval(), open_base(tiny_model).eval())
    got, wanted, whole = (logprobs_of(model, samples(), 1.0, Packing(10_000), Ranks("cpu")) for model in models)
    for ours, theirs, others in zip(got, wanted, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4 if dtype == "float32" else 0.3)
        assert abs(ours - others).max() > 0.05  # what mismatch/… tells of a rollout with the base as it is


def test_what_is_exported_is_an_ordinary_adapter(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (ours, config), (theirs, plain) = (export_weights(open_model(tiny_model, None, c, seed=1)) for c in (NF4, LORA))
    assert config == plain
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {n: (a.shape, a.dtype) for n, a in theirs.items()}


def test_a_quantised_policy_learns(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    policy = Policy(spec(tiny_model, adapter={"r": 4, "quantize": "nf4"}, policy={"activation_checkpointing": True}))
    before = {name: array.copy() for name, array in policy.export()[0].items()}
    told = policy.update(samples(), 0, 0.1)
    assert told["updated"] == 1.0
    assert told["mismatch/mean"] > 0
    assert all((array != before[name]).any() for name, array in policy.export()[0].items() if "lora_B" in name)


def test_where_it_cannot_work_it_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match=r"adapter\.quantize nf4: a reward model's head and adapter belong to"):
        RewardModelStage.model_validate({"data": {"path": "x"}, "adapter": {"quantize": "nf4"}})
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    with pytest.raises(InputError, match=r"adapter.quantize nf4 needs bitsandbytes: pip install 'raylign\[qlora\]'"):
        open_model(tiny_model, None, NF4, seed=1)
