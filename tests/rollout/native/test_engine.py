"""What is the native engine's own, beside what tests/rollout/test_conformance.py asks of every engine."""

import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.cluster.errors import InputError
from raylign.rollout.engine import RequestsFailed, generate
from raylign.rollout.native.engine import NativeEngine
from transformers import AttentionInterface, AutoModelForCausalLM

from ..models import ARCHITECTURES, VOCABULARY, make_adapter, save_model
from ..reference import Reference
from ..runs import bits, finish, request, tokens


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_gives_the_tokens_of_transformers_generate(architecture: str, tmp_path: Path):
    folder = save_model(tmp_path / architecture, architecture)
    reference = Reference(folder)
    engine = NativeEngine(folder, slots=5, max_length=100)
    requests = [request(i, length, temperature=0, max_tokens=40) for i, length in enumerate((1, 4, 9, 31, 33, 40, 2))]
    got = generate(engine, requests)
    for r in requests:
        assert tokens(got[r.request_id]) == [reference.greedy(r)]


def test_logprobs_in_bfloat16_are_those_of_a_plain_forward_in_bfloat16(llama: Path):
    reference = Reference(llama, dtype="bfloat16")
    engine = NativeEngine(llama, slots=8, max_length=64, dtype="bfloat16")
    for r in (request(1, n=3, temperature=0.7), request(2, temperature=0)):
        for completion in generate(engine, [r])[r.request_id]:
            assert np.abs(completion.logprobs - reference.logprobs(r, completion)).max() < 0.15


def test_a_prompt_is_prefilled_once_for_all_its_completions(llama: Path):
    engine = NativeEngine(llama, slots=3, max_length=64)
    several, one = request(1, n=7), request(2, n=1)
    generate(engine, [several, one])
    assert engine.computed == len(several.prompt) + len(one.prompt)


def test_a_prefix_that_was_seen_is_read_from_the_cache_and_changes_no_bit(llama: Path):
    prefix = np.arange(70, dtype=np.int32) % VOCABULARY
    ends = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    requests = [replace(request(i), prompt=np.concatenate([prefix, end])) for i, end in enumerate(ends)]
    alone = [generate(NativeEngine(llama, slots=8, max_length=128), [r])[r.request_id] for r in requests]
    engine = NativeEngine(llama, slots=8, max_length=128)
    together = generate(engine, requests)
    assert [bits(together[r.request_id]) for r in requests] == [bits(one) for one in alone]
    assert engine.reused == 64  # the two full blocks of 32, in the same step already
    again = generate(engine, [requests[0]])
    assert bits(again["r0"]) == bits(alone[0])
    assert engine.reused == 128
    engine.load_base({name: p.numpy() for name, p in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()})
    assert bits(generate(engine, [requests[0]])["r0"]) == bits(alone[0])
    assert engine.reused == 128  # new weights, nothing is known


def test_long_prompts_come_in_pieces_while_the_others_go_on(llama: Path, monkeypatch: pytest.MonkeyPatch):
    long = replace(request(0), prompt=np.arange(100, dtype=np.int32) % VOCABULARY)
    whole = generate(NativeEngine(llama, slots=8, max_length=128), [long])["r0"]
    monkeypatch.setattr("raylign.rollout.native.decoder.PROMPT_TOKENS", 30)
    engine = NativeEngine(llama, slots=8, max_length=128)
    engine.submit(request(1, max_tokens=20))
    engine.step()
    engine.submit(long)
    events = [engine.step() for _ in range(4)]
    assert [[e.request_id for e in step] for step in events] == [["r1"], ["r1"], ["r1"], ["r1", "r0"]]
    rest = [e for step in events for e in step if e.request_id == "r0"]
    while engine.busy:
        rest += [e for e in engine.step() if e.request_id == "r0"]
    assert [e.token for e in rest] == whole[0].tokens.tolist()
    assert [np.float32(e.logprob) for e in rest] == whole[0].logprobs.tolist()


def test_every_running_row_gets_one_token_a_step_and_slots_are_filled_at_once(llama: Path):
    engine = NativeEngine(llama, slots=4, max_length=64)
    engine.submit(request(0, n=6, max_tokens=3))
    counts = []
    while engine.busy:
        events = engine.step()
        assert len({(e.request_id, e.index) for e in events}) == len(events)
        counts.append(len(events))
    assert counts == [4, 4, 4, 2, 2, 2]


def test_max_length_is_cut_to_what_the_model_can_hold(llama: Path):
    assert NativeEngine(llama, slots=8, max_length=10_000).max_length == 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_need_one_name_and_the_head_follows_them(dtype: Any, tmp_path: Path):
    from safetensors.numpy import load_file

    folder, other = (save_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (0, 9))
    engine = NativeEngine(folder, slots=8, max_length=64, dtype=dtype)
    engine.load_base(load_file(other / "model.safetensors"))
    expected = generate(NativeEngine(other, slots=8, max_length=64, dtype=dtype), [request(1)])
    assert bits(generate(engine, [request(1)])["r1"]) == bits(expected["r1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_weights_reach_the_experts(dtype: Any, tmp_path: Path):
    folder, other = (save_model(tmp_path / str(seed), "mixtral", seed=seed) for seed in (0, 9))
    engine = NativeEngine(folder, slots=8, max_length=64, dtype=dtype)
    before = bits(generate(engine, [request(1)])["r1"])
    new = AutoModelForCausalLM.from_pretrained(other).state_dict()
    engine.load_base({name: parameter.numpy() for name, parameter in new.items()})
    expected = generate(NativeEngine(other, slots=8, max_length=64, dtype=dtype), [request(1)])
    assert bits(generate(engine, [request(1)])["r1"]) == bits(expected["r1"]) != before


def test_weights_that_diverged_end_their_own_requests_only(llama: Path, tmp_path: Path):
    tensors, config = make_adapter(llama, tmp_path / "a", 1)
    huge = {name: array * np.float32(1e30) for name, array in tensors.items()}
    engine = NativeEngine(llama, slots=8, max_length=64)
    engine.load_adapter("diverged", huge, config)
    good = request(1, n=3)
    expected = tokens(generate(engine, [good])["r1"])
    engine.submit(good)
    events = engine.step()
    engine.submit(request(2, adapter="diverged"))
    with pytest.raises(RequestsFailed, match=r"adapter diverged gives logits that are not finite.*\(requests r2\)"):
        engine.step()
    assert finish(engine, events) == {"r1": expected}


def test_the_last_tokens_of_a_request_are_not_lost_with_a_diverged_one(llama: Path, tmp_path: Path):
    tensors, config = make_adapter(llama, tmp_path / "a", 1)
    engine = NativeEngine(llama, slots=8, max_length=64)
    engine.load_adapter("diverged", {name: array * np.float32(1e30) for name, array in tensors.items()}, config)
    engine.submit(request(1, max_tokens=2))
    engine.step()
    engine.submit(request(2, adapter="diverged"))
    with pytest.raises(RequestsFailed) as failed:
        engine.step()
    assert failed.value.request_ids == {"r2"}
    assert pickle.loads(pickle.dumps(failed.value)).request_ids == {"r2"}
    assert [(e.request_id, e.finish_reason) for e in engine.step()] == [("r1", "length")]
    assert not engine.busy


def _t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _mamba(folder: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)


def _bloom(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)


def _dynamic_rope(folder: Path) -> None:
    save_model(folder, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


@pytest.mark.parametrize(
    ("save", "message"),
    [(_t5, "T5"), (_mamba, "Mamba"), (_bloom, "Bloom"), (_dynamic_rope, "dynamic RoPE")],
)
def test_architectures_it_cannot_run_exactly_are_refused_by_name(
    save: Callable[[Path], None], message: str, tmp_path: Path
):
    save(tmp_path)
    with pytest.raises(InputError, match=message):
        NativeEngine(tmp_path, slots=8, max_length=64)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no config\.json"):
        NativeEngine(tmp_path, slots=8, max_length=64)


def test_a_prompt_in_pieces_with_no_row_running_gives_the_tokens_of_transformers(
    llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """Steps with only a first piece of a prompt want no logits at all."""
    monkeypatch.setattr("raylign.rollout.native.decoder.PROMPT_TOKENS", 32)
    engine = NativeEngine(llama, slots=8, max_length=128)
    asked = request(0, 100, temperature=0, max_tokens=5)
    assert tokens(generate(engine, [asked])[asked.request_id]) == [Reference(llama).greedy(asked)]


def test_an_engine_that_is_gone_leaves_nothing_in_transformers(llama: Path):
    before = set(AttentionInterface._global_mapping)
    engine = NativeEngine(llama, slots=1, max_length=16)
    assert len(set(AttentionInterface._global_mapping) - before) == 1
    del engine
    gc.collect()
    assert set(AttentionInterface._global_mapping) <= before
