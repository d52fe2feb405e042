"""Adapters that only the native engine takes or refuses; what every engine does is in test_conformance.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.engine import generate
from raylign.rollout.native.engine import NativeEngine

from ..models import make_adapter, save_model
from ..reference import Reference
from ..runs import request, tokens

Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lora") / "base", "llama")


@pytest.fixture(scope="module")
def loaded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "all", 1)


def test_adapters_of_conv1d_layers_work_too(tmp_path: Path):
    base = save_model(tmp_path / "gpt2", "gpt2")
    engine = NativeEngine(base, slots=8, max_length=64)
    engine.load_adapter("a", *make_adapter(base, tmp_path / "a", 1, targets=["c_attn", "c_fc"]))
    r = request(1, adapter="a", temperature=0)
    assert tokens(generate(engine, [r])["r1"]) == [Reference(base, {"a": tmp_path / "a"}).greedy(r)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "lacks r or lora_alpha"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(config: dict[str, Any], message: str, base: Path, loaded: Loaded):
    tensors, settings = loaded
    engine = NativeEngine(base, slots=8, max_length=64)
    with pytest.raises(InputError, match=message):
        engine.load_adapter("x", tensors, settings | config)
    assert engine.adapters() == ()


def test_tensors_that_do_not_fit_are_refused(base: Path, loaded: Loaded):
    tensors, config = loaded
    engine = NativeEngine(base, slots=8, max_length=64)
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    bad = np.array(tensors[name])
    bad[0, 0] = np.nan
    changes = {
        "not finite": tensors | {name: bad},
        "do not fit": tensors | {name: tensors[name][:, :-1]},
        "has no layer": tensors | {name.replace("layers.0", "layers.9"): tensors[name]},
        "only one of": {n: t for n, t in tensors.items() if n != name},
        "not a LoRA factor": tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": bad},
        "no tensors": {},
    }
    for message, changed in changes.items():
        with pytest.raises(InputError, match=message):
            engine.load_adapter("x", changed, config)
    assert engine.adapters() == ()
