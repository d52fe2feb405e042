"""Adapters in the engine: PEFT's tokens, mixed with each other and with the base, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.cluster.errors import InputError
from raylign.rollout.engine import generate
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.records import GenerationRequest, Sampling, SeedKey

from ..models import VOCABULARY, make_adapter, save_model

Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lora") / "base", "llama")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Loaded]]:
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "all": {},
        "wide": {"r": 24},
        "few": {"targets": ["q_proj", "v_proj"]},
        "rslora": {"rslora": True},
        "down": {"targets": ["down_proj"]},
    }
    return {
        name: (root / name, make_adapter(base, root / name, seed, **kind))
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    }


def request(number: int, adapter: str | None) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"{adapter}-{number}",
        prompt=np.random.default_rng(number).integers(3, VOCABULARY, 5 + number).astype(np.int32),
        sampling=Sampling(temperature=0, max_tokens=16),
        seed=SeedKey(0, 0, number),
        adapter=adapter,
    )


def peft_tokens(base: Path, folder: Path | None, prompt: np.ndarray) -> list[int]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if folder:
        model = PeftModel.from_pretrained(model, folder)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        min_new_tokens=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def test_rows_of_many_adapters_in_one_batch_give_pefts_tokens(base: Path, adapters: dict[str, tuple[Path, Loaded]]):
    engine = NativeEngine(base, slots=16, max_length=64)
    for digest, (_, loaded) in adapters.items():
        engine.load_adapter(digest, *loaded)
    requests = [request(i, digest) for i in range(2) for digest in (None, *adapters)]
    together = generate(engine, requests)
    for r in requests:
        folder = adapters[r.adapter][0] if r.adapter else None
        tokens = together[r.request_id][0].tokens.tolist()
        assert tokens == peft_tokens(base, folder, r.prompt), r.adapter
        assert generate(engine, [r])[r.request_id][0].tokens.tolist() == tokens
    by_adapter = {tuple(together[f"{digest}-0"][0].tokens) for digest in (None, *adapters)}
    assert len(by_adapter) == 1 + len(adapters)


def test_adapters_of_conv1d_layers_work_too(tmp_path: Path):
    base = save_model(tmp_path / "gpt2", "gpt2")
    engine = NativeEngine(base, slots=8, max_length=64)
    engine.load_adapter("a", *make_adapter(base, tmp_path / "a", 1, targets=["c_attn", "c_fc"]))
    r = request(1, "a")
    assert generate(engine, [r])[r.request_id][0].tokens.tolist() == peft_tokens(base, tmp_path / "a", r.prompt)


def test_adapters_come_and_go_between_steps_but_not_while_in_use(base: Path, adapters: dict[str, tuple[Path, Loaded]]):
    engine = NativeEngine(base, slots=8, max_length=64)
    expected = generate(engine, [request(1, None)])["None-1"][0]
    engine.load_adapter("all", *adapters["all"][1])
    engine.load_adapter("all", *adapters["all"][1])
    assert engine.adapters() == ("all",)
    engine.submit(request(1, "all"))
    for _ in range(2):  # waiting, then running
        with pytest.raises(InputError, match="in use by 1 requests, 'all-1'"):
            engine.drop_adapter("all")
        engine.step()
    engine.load_adapter("few", *adapters["few"][1])
    while engine.busy:
        engine.step()
    engine.drop_adapter("all")
    assert engine.adapters() == ("few",)
    with pytest.raises(InputError, match="not loaded"):
        engine.drop_adapter("all")
    again = generate(engine, [request(1, None)])["None-1"][0]
    assert again.logprobs.tobytes() == expected.logprobs.tobytes()


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
def test_adapters_that_are_not_plain_lora_are_refused(
    config: dict[str, Any], message: str, base: Path, adapters: dict[str, tuple[Path, Loaded]]
):
    tensors, settings = adapters["all"][1]
    engine = NativeEngine(base, slots=8, max_length=64)
    with pytest.raises(InputError, match=message):
        engine.load_adapter("x", tensors, settings | config)
    assert engine.adapters() == ()


def test_tensors_that_do_not_fit_are_refused(base: Path, adapters: dict[str, tuple[Path, Loaded]]):
    tensors, config = adapters["few"][1]
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
