"""vLLM itself, on a CPU: against transformers and PEFT, under load, and where it has to refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.engine import RequestsFailed, TokenEvent, generate
from raylign.rollout.records import Completion

from .conftest import ask, save_llama, transformers_greedy

pytestmark = pytest.mark.vllm

Adapters = dict[str, tuple[Path, Any, Any]]


def one(engine: Any, request: Any) -> Completion:
    return generate(engine, [request])[request.request_id][0]


def use(engine: Any, adapters: Adapters, *digests: str) -> None:
    """Load these adapters and drop others."""
    for digest in set(engine.adapters()) - set(digests):
        engine.drop_adapter(digest)
    for digest in digests:
        engine.load_adapter(digest, *adapters[digest][1:])


def until(engine: Any, request_id: str, count: int = 1) -> list[TokenEvent]:
    """Step until a request has given some tokens; gives everything that came by then."""
    events: list[TokenEvent] = []
    while sum(event.request_id == request_id for event in events) < count:
        events += engine.step()
    return events


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_greedy_gives_the_tokens_of_transformers_generate(engine: Any, llama: Path):
    requests = [ask(i, length, max_tokens=30) for i, length in enumerate((1, 4, 9, 31, 33, 140, 2, 5, 6, 7))]
    done = generate(engine, requests)
    for request in requests:
        assert done[request.request_id][0].tokens.tolist() == transformers_greedy(llama, request), request.request_id
        assert done[request.request_id][0].finish_reason == "length"


def test_base_and_two_adapters_in_one_batch_are_what_each_is_alone_under_peft(
    engine: Any, llama: Path, adapters: Adapters
):
    use(engine, adapters, "a", "b")
    requests = [ask(i, 5 + i, adapter=(None, "a", "b")[i % 3]) for i in range(7)]
    done = generate(engine, requests)
    for request in requests:
        folder = adapters[request.adapter][0] if request.adapter else None
        assert done[request.request_id][0].tokens.tolist() == transformers_greedy(llama, request, folder)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7}])
def test_log_probs_are_a_plain_forwards(engine: Any, llama: Path, sampling: dict[str, float]):
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    request = ask(3, 11, n=4, top_logprobs=5, **sampling)
    for completion in generate(engine, [request])["r3"]:
        tokens = torch.tensor(np.concatenate([request.prompt, completion.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, len(request.prompt) - 1 : -1] / (sampling["temperature"] or 1.0)
        expected = torch.log_softmax(logits, -1)
        assert completion.logprobs == pytest.approx(
            expected.gather(1, tokens[len(request.prompt) :, None])[:, 0].numpy(), abs=1e-3
        )
        best = expected.topk(5)
        assert completion.top is not None
        assert completion.top.logprobs == pytest.approx(best.values.numpy(), abs=1e-3)
        assert completion.top.ids.tolist() == best.indices.tolist()


def test_log_probs_are_those_of_the_cut_distribution(engine: Any):
    """With top_k=2 the two likeliest tokens hold all probability, whichever was drawn."""
    completion = one(engine, ask(4, temperature=1.0, top_k=2, top_logprobs=3, max_tokens=30))
    assert completion.top is not None
    assert np.exp(completion.top.logprobs[:, :2]).sum(1) == pytest.approx(np.ones(30), abs=1e-4)
    assert np.isneginf(completion.top.logprobs[:, 2]).all()
    assert all(token in ids[:2] for token, ids in zip(completion.tokens, completion.top.ids, strict=True))


def test_a_samples_tokens_come_from_its_seed_key(engine: Any):
    group = ask(7, n=6, temperature=1.0, max_tokens=20)
    first = [c.tokens.tolist() for c in generate(engine, [group])["r7"]]
    assert len({tuple(tokens) for tokens in first}) == 6
    # Sample 4 of the group asked for alone, under another name, in other company.
    alone = replace(group, request_id="alone", n=1, seed=group.seed._replace(sample=4))
    done = generate(engine, [ask(20), alone, ask(21, temperature=1.0)])
    assert done["alone"][0].tokens.tolist() == first[4]
    other = replace(group, seed=group.seed._replace(step=1))
    assert [c.tokens.tolist() for c in generate(engine, [other])["r7"]] != first


def test_adapters_come_and_go_while_requests_run(engine: Any, llama: Path, adapters: Adapters):
    use(engine, adapters, "a")
    long = ask(30, adapter="a", max_tokens=200)
    engine.submit(long)
    events = until(engine, "r30")
    use_b = ask(31, adapter="b")
    with pytest.raises(InputError, match="adapter b, which is not loaded"):
        engine.submit(use_b)
    engine.load_adapter("b", *adapters["b"][1:])
    engine.submit(use_b)
    with pytest.raises(InputError, match="adapter a is in use by 1 requests, 'r30' among them"):
        engine.drop_adapter("a")
    while engine.busy:
        events += engine.step()
    for request in (long, use_b):
        tokens = [event.token for event in events if event.request_id == request.request_id]
        assert tokens == transformers_greedy(llama, request, adapters[str(request.adapter)][0])
    engine.drop_adapter("a")
    assert engine.adapters() == ("b",)
    with pytest.raises(InputError, match="adapter a is not loaded"):
        engine.drop_adapter("a")


def test_a_digest_is_never_served_from_what_another_left_behind(engine: Any, llama: Path, adapters: Adapters):
    """The same prompt, long enough for the prefix cache, under one digest after the other."""
    for digest in "abab":
        use(engine, adapters, digest)
        request = ask(40, 300, adapter=digest)
        assert one(engine, request).tokens.tolist() == transformers_greedy(llama, request, adapters[digest][0])


def test_new_base_weights_change_what_is_generated_and_no_cache_serves_the_old(
    engine: Any, llama: Path, adapters: Adapters, tmp_path: Path
):
    other = save_llama(tmp_path / "other", seed=9)
    use(engine, adapters, "a")
    plain, adapted = ask(50, 300), ask(51, 300, adapter="a")
    generate(engine, [plain, adapted])
    for folder in (other, llama):
        engine.load_base(weights_of(folder))
        done = generate(engine, [plain, adapted])
        assert done["r50"][0].tokens.tolist() == transformers_greedy(folder, plain)
        assert done["r51"][0].tokens.tolist() == transformers_greedy(folder, adapted, adapters["a"][0])


def test_base_weights_that_do_not_fit_are_refused_and_change_nothing(engine: Any, llama: Path):
    request, weights = ask(52), weights_of(llama)
    before = one(engine, request).tokens.tolist()
    name = "model.norm.weight"
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != name}, f"the weights lack {name}"),
        (weights | {name: np.zeros(3, np.float32)}, rf"{name} has the shape \(3,\)"),
        (weights | {"model.extra": np.zeros(3, np.float32)}, "the weights have model.extra"),
    ):
        with pytest.raises(InputError, match=message):
            engine.load_base(wrong)
    engine.submit(request)
    with pytest.raises(InputError, match="cannot be replaced while requests run"):
        engine.load_base(weights)
    engine.abort("r52")
    assert one(engine, request).tokens.tolist() == before


def test_weights_that_are_not_finite_fail_their_requests_alone(engine: Any, llama: Path):
    weights = weights_of(llama)
    engine.load_base(weights | {"model.norm.weight": np.full(32, np.nan, np.float32)})
    engine.submit(ask(60, n=2))
    with pytest.raises(RequestsFailed, match="the base model gives logits that are not finite") as failed:
        until(engine, "r60")
    assert failed.value.request_ids == {"r60"}
    assert not engine.busy
    engine.load_base(weights)
    assert len(one(engine, ask(60)).tokens) == 12


def test_an_aborted_request_says_no_more_and_the_others_go_on(engine: Any, llama: Path):
    stays, leaves = ask(70, max_tokens=60), ask(71, n=3, max_tokens=300)
    engine.submit(leaves)
    engine.submit(stays)
    events = until(engine, "r71", 5)
    engine.abort("r71")
    engine.abort("unknown")
    after: list[TokenEvent] = []
    while engine.busy:
        after += engine.step()
    assert {event.request_id for event in after} == {"r70"}
    tokens = [event.token for event in events + after if event.request_id == "r70"]
    assert tokens == transformers_greedy(llama, stays)
    engine.submit(leaves)  # its name is free again
    engine.abort("r71")
    assert not engine.busy


def test_a_row_ends_at_a_stop_string_or_token(engine: Any, llama: Path):
    from transformers import AutoTokenizer

    request = ask(80, max_tokens=40)
    tokens = one(engine, request).tokens.tolist()
    text = AutoTokenizer.from_pretrained(llama)
    place = next(i for i in range(5, 40) if tokens[i] not in tokens[:i] and tokens[i - 1 : i + 1] != tokens[:2])
    stop = text.decode(tokens[place - 1 : place + 1], skip_special_tokens=False)
    reason = {}
    for name, sampling in (("ids", {"stop_token_ids": (tokens[place],)}), ("text", {"stop": (stop, "never")})):
        done = one(engine, replace(request, sampling=replace(request.sampling, **sampling)))
        assert done.finish_reason == "stop"
        reason[name] = done.tokens.tolist()
    assert reason["ids"] == tokens[: place + 1]
    assert stop in text.decode(reason["text"], skip_special_tokens=False)
    assert stop not in text.decode(reason["text"][:-1], skip_special_tokens=False)
    assert not engine.busy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "empty prompt"),
        ({"prompt": np.full(395, 5, np.int32)}, "needs 395 prompt \\+ 12 new tokens, the engine holds 400"),
        ({"prompt": np.array([5, 999], np.int32)}, "token ids outside of 0"),
        ({"adapter": "none-such"}, "adapter none-such, which is not loaded"),
        ({"temperature": 0.001}, "vLLM draws at temperatures from 0.01 on"),
        ({"temperature": 3.0}, "vLLM refuses its sampling: temperature must be in \\[0, 2\\]"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine: Any, change: dict[str, Any], message: str):
    request = ask(90)
    if "temperature" in change:
        change = {"sampling": replace(request.sampling, **change)}
    with pytest.raises(InputError, match=message):
        engine.submit(replace(request, **change))
    assert not engine.busy


def test_an_adapter_that_vllm_cannot_serve_is_refused(engine: Any, llama: Path, adapters: Adapters, tmp_path: Path):
    from ..models import make_adapter

    _, tensors, config = adapters["a"]
    some = next(iter(tensors))
    wide = make_adapter(llama, tmp_path / "wide", 3, r=33, targets=["q_proj"])
    refused = [
        (*wide, "has rank 33, the vLLM engine takes 32 at most"),
        (tensors | {some: np.full_like(tensors[some], np.nan)}, config, "numbers that are not finite"),
        (tensors, config | {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (tensors, config | {"use_dora": True}, "DoRA"),
        ({f"{k}.x" if k == some else k: v for k, v in tensors.items()}, config, "vLLM cannot load adapter bad"),
        ({}, config, "has no tensors"),
    ]
    for wrong, settings, message in refused:
        with pytest.raises(InputError, match=message):
            engine.load_adapter("bad", wrong, settings)
    assert "bad" not in engine.adapters()
    assert len(one(engine, ask(91)).tokens) == 12


def test_sleep_needs_a_gpu(engine: Any):
    for call in (engine.sleep, engine.wake):
        with pytest.raises(InputError, match="this engine runs on cpu"):
            call()


def test_heads_of_a_size_that_vllm_has_no_kernel_for_are_refused(tmp_path: Path):
    from raylign.rollout.engines import ENGINES

    from ..models import save_model

    folder = save_model(tmp_path / "small-heads", "llama")
    with pytest.raises(InputError, match="attention heads of size 8; on a CPU vLLM has 32, 64"):
        ENGINES["vllm"](folder, 8, 100, "float32", "cpu")
