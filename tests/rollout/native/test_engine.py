"""The native engine against transformers, and against itself in other company."""

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.cluster.errors import InputError
from raylign.rollout.engine import RequestsFailed, TokenEvent, generate
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.records import Completion, GenerationRequest, Sampling, SeedKey
from transformers import AutoModelForCausalLM

from ..models import ARCHITECTURES, VOCABULARY, make_adapter, save_model


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def request(number: int, length: int = 6, *, n: int = 1, adapter: str | None = None, **sampling: Any):
    rng = np.random.default_rng(number)
    return GenerationRequest(
        request_id=f"r{number}",
        prompt=rng.integers(3, VOCABULARY, length).astype(np.int32),
        sampling=Sampling(**{"max_tokens": 12} | sampling),
        seed=SeedKey(5, 0, number),
        n=n,
        adapter=adapter,
    )


def bits(completions: list[Completion]) -> list[tuple[bytes, bytes, str]]:
    return [(c.tokens.tobytes(), c.logprobs.tobytes(), c.finish_reason) for c in completions]


def run_in_turns(engine: NativeEngine, arrivals: list[list[GenerationRequest]]) -> dict[str, list[Any]]:
    """Submit one batch of requests before each step; gives every row's tokens and log-probs."""
    rows: dict[str, list[list[TokenEvent]]] = {}
    pending = list(arrivals)
    while pending or engine.busy:
        for r in pending.pop(0) if pending else []:
            rows[r.request_id] = [[] for _ in range(r.n)]
            engine.submit(r)
        for event in engine.step():
            rows[event.request_id][event.index].append(event)
    return {
        name: [
            (
                np.array([e.token for e in events], np.int32).tobytes(),
                np.array([e.logprob for e in events], np.float32).tobytes(),
                events[-1].finish_reason,
            )
            for events in samples
        ]
        for name, samples in rows.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_gives_the_tokens_of_transformers_generate(architecture: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / architecture, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = NativeEngine(folder, slots=5, max_length=100)
    requests = [request(i, length, temperature=0, max_tokens=40) for i, length in enumerate((1, 4, 9, 31, 33, 40, 2))]
    got = generate(engine, requests)
    for r in requests:
        ids = torch.from_numpy(r.prompt.astype(np.int64))[None]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            min_new_tokens=40,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert got[r.request_id][0].tokens.tolist() == out[0, len(r.prompt) :].tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_logprobs_are_those_of_a_plain_forward(dtype: Any, tolerance: float, llama: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    engine = NativeEngine(llama, slots=8, max_length=64, dtype=dtype)
    for r in (request(1, n=3, temperature=0.7), request(2, n=1, temperature=0)):
        for completion in generate(engine, [r])[r.request_id]:
            tokens = np.concatenate([r.prompt, completion.tokens]).astype(np.int64)
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens)[None]).logits[0, len(r.prompt) - 1 : -1].float()
            logprobs = torch.log_softmax(logits / (r.sampling.temperature or 1.0), -1)
            expected = logprobs[range(len(completion.tokens)), completion.tokens.tolist()]
            assert np.abs(completion.logprobs - expected.numpy()).max() < tolerance


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("qwen3", "float32"),
        ("gemma3-sliding", "bfloat16"),
        ("gpt2", "float32"),
    ],
)
def test_any_company_slots_and_order_give_the_same_bits(dtype: Any, architecture: str, tmp_path: Path):
    folder = save_model(tmp_path / "model", architecture)
    adapters = {f"adapter-{i}": make_adapter(folder, tmp_path / str(i), i, r=r) for i, r in enumerate((4, 4, 20))}
    rng = random.Random(3)
    names = [None, *adapters]
    requests = [
        request(
            i,
            rng.choice((1, 2, 5, 13, 30, 31, 32, 60)),
            n=rng.choice((1, 2, 5)),
            adapter=rng.choice(names),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.8)),
            max_tokens=rng.choice((1, 2, 7, 20, 40)),
        )
        for i in range(12)
    ]

    def engine(slots: int) -> NativeEngine:
        built = NativeEngine(folder, slots=slots, max_length=128, dtype=dtype)
        for digest, (tensors, config) in adapters.items():
            built.load_adapter(digest, tensors, config)
        return built

    small = engine(1)
    alone = {r.request_id: bits(generate(small, [r])[r.request_id]) for r in requests}
    for slots in (3, 8, 13, 64):
        shuffled = rng.sample(requests, len(requests))
        turns = [shuffled[i : i + 2] for i in range(0, len(shuffled), 2)] if slots % 2 else [shuffled]
        assert run_in_turns(engine(slots), turns) == alone


def test_a_sample_of_a_group_is_the_same_when_it_is_asked_for_by_itself(llama: Path):
    engine = NativeEngine(llama, slots=8, max_length=64)
    group = generate(engine, [request(4, n=5)])["r4"]
    single = replace(request(4), seed=SeedKey(5, 0, 4, sample=3))
    assert bits(generate(engine, [single])["r4"]) == bits(group[3:4])
    assert len({c.tokens.tobytes() for c in group}) == 5


def test_a_prompt_is_prefilled_once_for_all_its_completions(llama: Path):
    engine = NativeEngine(llama, slots=3, max_length=64)
    several, one = request(1, n=7), request(2, n=1)
    generate(engine, [several, one])
    assert engine.counts["prompt_tokens"] == len(several.prompt) + len(one.prompt)


def test_a_prefix_that_was_seen_is_read_from_the_cache_and_changes_no_bit(llama: Path):
    prefix = np.arange(70, dtype=np.int32) % VOCABULARY
    ends = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    requests = [replace(request(i), prompt=np.concatenate([prefix, end])) for i, end in enumerate(ends)]
    alone = [generate(NativeEngine(llama, slots=8, max_length=128), [r])[r.request_id] for r in requests]
    engine = NativeEngine(llama, slots=8, max_length=128)
    together = generate(engine, requests)
    assert [bits(together[r.request_id]) for r in requests] == [bits(one) for one in alone]
    assert engine.counts["prompt_tokens_reused"] == 64  # the two full blocks of 32, in the same step already
    again = generate(engine, [requests[0]])
    assert bits(again["r0"]) == bits(alone[0])
    assert engine.counts["prompt_tokens_reused"] == 128
    engine.load_base({name: p.numpy() for name, p in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()})
    assert bits(generate(engine, [requests[0]])["r0"]) == bits(alone[0])
    assert engine.counts["prompt_tokens_reused"] == 128  # new weights, nothing is known


def test_long_prompts_come_in_pieces_while_the_others_go_on(llama: Path, monkeypatch: pytest.MonkeyPatch):
    long = replace(request(0), prompt=np.arange(100, dtype=np.int32) % VOCABULARY)
    whole = generate(NativeEngine(llama, slots=8, max_length=128), [long])["r0"]
    monkeypatch.setattr("raylign.rollout.native.engine.PROMPT_TOKENS", 30)
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


def test_stop_tokens_end_a_row_and_are_its_last_token(llama: Path):
    engine = NativeEngine(llama, slots=8, max_length=64)
    free = generate(engine, [request(3, temperature=0)])["r3"][0].tokens.tolist()
    stop = next(t for t in free if t != free[0])
    completion = generate(engine, [request(3, temperature=0, stop_token_ids=(stop, 96))])["r3"][0]
    assert completion.tokens.tolist() == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"


def test_stop_strings_end_a_row_where_they_are_complete(tiny_model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = NativeEngine(tiny_model, slots=8, max_length=128)
    prompt = np.array(tokenizer("hello")["input_ids"], np.int32)
    ask = replace(request(1), prompt=prompt, sampling=Sampling(temperature=1.0, max_tokens=80))
    free = generate(engine, [ask])["r1"][0].tokens.tolist()
    stop = tokenizer.decode(free[20:23])
    end = next(i for i in range(1, 81) if stop in tokenizer.decode(free[:i]))
    completion = generate(engine, [replace(ask, sampling=replace(ask.sampling, stop=("no such text", stop)))])["r1"][0]
    assert completion.tokens.tolist() == free[:end]
    assert completion.finish_reason == "stop"


def test_abort_removes_waiting_and_running_rows_and_leaves_the_others_their_bits(llama: Path):
    engine = NativeEngine(llama, slots=4, max_length=64)
    kept = request(1, n=2)
    expected = bits(generate(engine, [kept])["r1"])
    for r in (request(0, n=2), kept, request(2, n=3)):
        engine.submit(r)
    events = engine.step()
    engine.abort("r0")
    engine.abort("r2")
    engine.abort("never heard of")
    while engine.busy:
        new = engine.step()
        assert {e.request_id for e in new} == {"r1"}
        events += new
    got = [[e.token for e in events if (e.request_id, e.index) == ("r1", i)] for i in range(2)]
    assert [np.array(tokens, np.int32).tobytes() for tokens in got] == [tokens for tokens, *_ in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.arange(60, dtype=np.int32)}, "60 prompt \\+ 12 new tokens, the engine holds 64"),
        ({"prompt": np.array([], np.int32)}, "empty prompt"),
        ({"prompt": np.array([3, VOCABULARY], np.int32)}, "outside of 0 … 96"),
        ({"adapter": "a1b2"}, "adapter a1b2, which is not loaded"),
        ({"n": 0}, "n=0"),
        ({"sampling": Sampling(temperature=-1.0, max_tokens=4)}, "temperature -1.0"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(change: dict[str, Any], message: str, llama: Path):
    engine = NativeEngine(llama, slots=8, max_length=64)
    with pytest.raises(InputError, match=message):
        engine.submit(replace(request(1), **change))
    assert not engine.busy


def test_the_same_name_twice_is_refused_while_it_runs(llama: Path):
    engine = NativeEngine(llama, slots=8, max_length=64)
    generate(engine, [request(1)])
    engine.submit(request(1))
    with pytest.raises(InputError, match="'r1' is already running"):
        engine.submit(request(1))


def test_max_length_is_cut_to_what_the_model_can_hold(llama: Path):
    assert NativeEngine(llama, slots=8, max_length=10_000).max_length == 256


def test_new_base_weights_take_effect_and_must_fit(llama: Path, tmp_path: Path):
    from safetensors.numpy import load_file

    other = save_model(tmp_path / "other", "llama", seed=9)
    tensors = load_file(other / "model.safetensors")
    engine = NativeEngine(llama, slots=8, max_length=64)
    before = bits(generate(engine, [request(1)])["r1"])
    engine.submit(request(2))
    with pytest.raises(InputError, match="while requests run"):
        engine.load_base(tensors)
    engine.abort("r2")
    engine.load_base(tensors)
    after = bits(generate(engine, [request(1)])["r1"])
    assert after != before
    assert after == bits(generate(NativeEngine(other, slots=8, max_length=64), [request(1)])["r1"])
    name = "model.norm.weight"
    with pytest.raises(InputError, match=f"lack {name}"):
        engine.load_base({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(InputError, match="shape"):
        engine.load_base(tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="nonsense"):
        engine.load_base(tensors | {"nonsense": np.zeros(3, np.float32)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_need_one_name_and_the_head_follows_them(dtype: Any, tmp_path: Path):
    from safetensors.numpy import load_file

    folder, other = (save_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (0, 9))
    engine = NativeEngine(folder, slots=8, max_length=64, dtype=dtype)
    engine.load_base(load_file(other / "model.safetensors"))
    expected = generate(NativeEngine(other, slots=8, max_length=64, dtype=dtype), [request(1)])
    assert bits(generate(engine, [request(1)])["r1"]) == bits(expected["r1"])


def test_weights_that_diverged_end_their_own_requests_only(llama: Path, tmp_path: Path):
    tensors, config = make_adapter(llama, tmp_path / "a", 1)
    huge = {name: array * np.float32(1e30) for name, array in tensors.items()}
    engine = NativeEngine(llama, slots=8, max_length=64)
    engine.load_adapter("diverged", huge, config)
    good = request(1, n=3)
    expected = bits(generate(engine, [good])["r1"])
    engine.submit(good)
    events = engine.step()
    engine.submit(request(2, adapter="diverged"))
    with pytest.raises(RequestsFailed, match=r"adapter diverged gives logits that are not finite.*\(requests r2\)"):
        engine.step()
    while engine.busy:
        events += engine.step()
    got = [[e.token for e in events if e.index == i] for i in range(3)]
    assert [np.array(tokens, np.int32).tobytes() for tokens in got] == [tokens for tokens, *_ in expected]


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
