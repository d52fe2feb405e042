"""What every engine must do, whichever it is: `ENGINES` of rollout/engines.py, held against transformers and PEFT.

The engine is shared: each test leaves it idle and without adapters (conftest.py).
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.cluster.weights import load_adapter
from raylign.rollout.engine import Engine, RequestsFailed, generate
from raylign.rollout.engines import ENGINES
from raylign.rollout.records import Sampling

from benchmarks.models import save_tokenizer

from .conftest import SLOTS, TRAITS, WIDE, Model, Shop
from .models import save_model
from .reference import Reference, check_top, chi_squared_excess
from .runs import bits, finish, request, run_in_turns, tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": WIDE,
    "gemma": WIDE,
    "gemma3-sliding": WIDE,
    "gpt2": {"n_embd": 64, "n_head": 2},
}


def load(engine: Engine, model: Model, *digests: str) -> None:
    for digest in digests:
        engine.load_adapter(digest, *load_adapter(model.adapters[digest]))


def test_every_engine_takes_part():
    assert TRAITS.keys() == ENGINES.keys()


def test_greedy_gives_the_tokens_of_transformers_generate(engine: Engine, model: Model):
    requests = [request(i, n, temperature=0, max_tokens=40) for i, n in enumerate((1, 4, 9, 31, 33, 40, 2, 64, 88))]
    got = generate(engine, requests)
    for r in requests:
        assert tokens(got[r.request_id]) == [model.reference.greedy(r)]


def test_rows_of_many_adapters_in_one_batch_give_pefts_tokens_and_those_of_each_alone(engine: Engine, model: Model):
    load(engine, model, *model.adapters)
    requests = [
        request(2 * i + j, 5 + i, adapter=digest, temperature=0, max_tokens=16)
        for i, digest in enumerate((None, *model.adapters))
        for j in range(2)
    ]
    together = generate(engine, requests)
    for r in requests:
        completion = together[r.request_id][0]
        assert completion.tokens.tolist() == model.reference.greedy(r), r.adapter
        assert tokens(generate(engine, [r])[r.request_id]) == [completion.tokens.tolist()]
    same_prompt = [replace(request(9, temperature=0), request_id=str(d), adapter=d) for d in (None, *model.adapters)]
    assert len({str(tokens(row)) for row in generate(engine, same_prompt).values()}) == 1 + len(model.adapters)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "min_p": 0.05, "top_k": 20, "top_p": 0.9},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.8, "top_k": 30, "frequency_penalty": -0.7, "logit_bias": ((5, 4.0), (9, -100.0), (11, 3.5))},
    ],
)
def test_logprobs_are_those_of_a_plain_forward(sampling: dict[str, Any], engine: Engine, model: Model, shop: Shop):
    load(engine, model, "every-layer")
    for r in (request(1, n=3, **sampling), request(2, 20, n=2, adapter="every-layer", **sampling)):
        for completion in generate(engine, [r])[r.request_id]:
            assert completion.logprobs.dtype == np.float32
            difference = completion.logprobs - model.reference.logprobs(r, completion)
            assert np.abs(difference).max() < shop.traits.tolerance


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 12},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.8, "min_p": 0.1},
        {"temperature": 2.0, "min_p": 0.02, "top_k": 30, "top_p": 0.8},
    ],
)
def test_tokens_are_drawn_from_just_the_distribution_asked_for(
    sampling: dict[str, Any], engine: Engine, model: Model, shop: Shop
):
    r = request(3, n=1000, max_tokens=1, top_logprobs=5, **sampling)
    expected = model.reference.first(r)
    completions = generate(engine, [r])[r.request_id]
    drawn = np.array([c.tokens[0] for c in completions])
    assert set(drawn) <= set(np.flatnonzero(expected))
    assert chi_squared_excess(np.bincount(drawn, minlength=len(expected)), expected * len(drawn)) < 0
    of_drawn = np.log(expected[drawn])
    assert np.abs(np.concatenate([c.logprobs for c in completions]) - of_drawn).max() < shop.traits.tolerance
    best = np.argsort(-expected)[:5]
    with np.errstate(divide="ignore"):
        check_top(completions[0].top, best, np.log(expected[best]), shop.traits.tolerance)


def test_top_logprobs_come_with_every_token_of_the_rows_that_ask(engine: Engine):
    asking, other = request(1, n=2, top_logprobs=3, max_tokens=5), request(2, temperature=0, max_tokens=9)
    greedy = request(4, temperature=0, top_logprobs=1)
    got = generate(engine, [asking, other, greedy])
    for completion in got["r1"]:
        assert completion.top is not None
        assert completion.top.ids.shape == completion.top.logprobs.shape == (5, 3)
        assert (np.diff(completion.top.logprobs) <= 0).all()
        for token, logprob, ids, best in zip(completion.tokens, completion.logprobs, *completion.top, strict=True):
            assert best[-1] >= logprob or best[ids.tolist().index(token)] == logprob
    assert got["r2"][0].top is None
    top = got["r4"][0].top
    assert top is not None
    assert top.ids[:, 0].tolist() == got["r4"][0].tokens.tolist()
    assert top.logprobs[:, 0].tolist() == got["r4"][0].logprobs.tolist()


def test_a_penalty_and_a_bias_decide_what_is_greedy(engine: Engine):
    plain = generate(engine, [request(1, temperature=0, max_tokens=40)])["r1"][0].tokens.tolist()
    varied = generate(engine, [request(1, temperature=0, max_tokens=40, frequency_penalty=2.0)])["r1"][0]
    assert len(set(varied.tokens.tolist())) > len(set(plain)), "without a penalty it repeats itself"
    biased = generate(engine, [request(1, temperature=0, max_tokens=4, logit_bias=((7, 100.0),))])["r1"][0]
    assert biased.tokens.tolist() == [7] * 4


def test_rows_with_biases_change_nothing_for_the_others(engine: Engine, shop: Shop):
    plain = request(1, n=2, max_tokens=20)
    shaped = [request(i, max_tokens=20, presence_penalty=2.0, logit_bias=((i, 5.0),)) for i in range(2, 6)]
    alone = [generate(engine, [r])[r.request_id] for r in (plain, *shaped)]
    together = generate(engine, [*shaped, plain])
    for r, row in zip((plain, *shaped), alone, strict=True):
        assert tokens(together[r.request_id]) == tokens(row)
        if shop.traits.exact:
            assert bits(together[r.request_id]) == bits(row)


def test_a_row_that_goes_on_is_penalised_for_what_it_has(engine: Engine, shop: Shop):
    if not (shop.traits.exact and shop.traits.goes_on):
        pytest.skip("this engine cannot go on bit for bit, or refuses penalties then")
    whole = request(1, n=1, max_tokens=20, frequency_penalty=1.5)
    made = generate(engine, [whole])["r1"][0].tokens
    rest = replace(
        whole,
        prompt=np.concatenate([whole.prompt, made[:8]]),
        drawn=8,
        sampling=replace(whole.sampling, max_tokens=12),
    )
    assert generate(engine, [rest])["r1"][0].tokens.tolist() == made[8:].tolist()


def test_a_long_row_and_more_short_ones_than_there_are_slots(engine: Engine, model: Model):
    long = request(0, 20, temperature=0, max_tokens=100)
    short = [request(i, 1 + i % 7, temperature=0, max_tokens=1 + i % 5) for i in range(1, 4 * SLOTS)]
    for r in (long, *short):
        engine.submit(r)
    got: dict[str, list[int]] = {}
    ends: list[str] = []
    while engine.busy:
        for event in engine.step():
            got.setdefault(event.request_id, []).append(event.token)
            if event.finish_reason:
                assert event.finish_reason == "length"
                ends.append(event.request_id)
    assert ends[-1] == "r0"
    assert len(ends) == len(set(ends)) == 4 * SLOTS
    for r in (long, *short):
        assert got[r.request_id] == model.reference.greedy(r)


def test_same_seeds_give_the_same_tokens_in_any_order_of_arrival(engine: Engine, model: Model, shop: Shop):
    load(engine, model, "every-layer", "attention")
    rng = random.Random(3)
    requests = [
        request(
            i,
            rng.choice((1, 5, 13, 31, 60)),
            n=rng.choice((1, 2, 5)),
            adapter=rng.choice((None, "every-layer", "attention")),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.8)),
            min_p=rng.choice((0.0, 0.1)),
            max_tokens=rng.choice((1, 2, 7, 20, 40)),
        )
        for i in range(10)
    ]
    alone = {r.request_id: generate(engine, [r])[r.request_id] for r in requests}
    same = bits if shop.traits.exact else tokens
    for size in (len(requests), 1, 3):
        shuffled = rng.sample(requests, len(requests))
        turns = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        for name, completions in run_in_turns(engine, turns).items():
            assert same(completions) == same(alone[name]), name


def test_a_sample_of_a_group_is_the_same_when_it_is_asked_for_by_itself(engine: Engine, shop: Shop):
    group = generate(engine, [request(4, n=5)])["r4"]
    single = generate(engine, [replace(request(4), seed=request(4).seed._replace(sample=3))])["r4"]
    same = bits if shop.traits.exact else tokens
    assert same(single) == same(group[3:4])
    assert len({c.tokens.tobytes() for c in group}) == 5


def test_a_row_that_goes_on_draws_behind_what_it_has(engine: Engine, shop: Shop):
    """It takes the random numbers that follow, and never those again that drew what it has."""
    whole = generate(engine, [request(4, n=2)])["r4"][1]
    asked = request(4, max_tokens=7)
    prompt, seed = np.concatenate([asked.prompt, whole.tokens[:5]]), asked.seed._replace(sample=1)
    on = replace(asked, prompt=prompt, seed=seed, drawn=5)
    (rest,) = generate(engine, [on])["r4"]
    (again,) = generate(engine, [replace(on, drawn=0)])["r4"]
    assert len(rest.tokens) == 7
    assert rest.tokens.tolist() != again.tokens.tolist()
    if shop.traits.exact and shop.traits.goes_on:
        assert rest.tokens.tolist() == whole.tokens[5:].tolist()
        assert rest.logprobs.tobytes() == whole.logprobs[5:].tobytes()


def test_stop_tokens_end_a_row_and_are_its_last_token(engine: Engine):
    free = generate(engine, [request(3, temperature=0)])["r3"][0].tokens.tolist()
    stop = next(t for t in free if t != free[0])
    completion = generate(engine, [request(3, temperature=0, stop_token_ids=(stop, 96))])["r3"][0]
    assert completion.tokens.tolist() == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"


def test_stop_strings_end_a_row_where_they_are_complete(engine: Engine, model: Model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    free = generate(engine, [request(1, max_tokens=80)])["r1"][0].tokens.tolist()
    stop = tokenizer.decode(free[20:23])
    end = next(i for i in range(1, 81) if stop in tokenizer.decode(free[:i]))
    completion = generate(engine, [request(1, max_tokens=80, stop=("no such text", stop))])["r1"][0]
    assert completion.tokens.tolist() == free[:end]
    assert completion.finish_reason == "stop"


def test_a_stop_on_the_last_token_allowed_is_a_stop(engine: Engine):
    free = generate(engine, [request(3)])["r3"][0]
    first = free.tokens.tolist().index(free.tokens[5])
    completion = generate(engine, [request(3, max_tokens=first + 1, stop_token_ids=(int(free.tokens[5]),))])["r3"][0]
    assert (free.finish_reason, completion.finish_reason) == ("length", "stop")
    assert completion.tokens.tolist() == free.tokens[: first + 1].tolist()


def test_aborted_requests_say_nothing_more_and_the_others_go_on_as_they_would_have(engine: Engine):
    kept = request(1, n=2)
    expected = tokens(generate(engine, [kept])["r1"])
    again = tokens(generate(engine, [request(2)])["r2"])
    for r in (request(0, n=2, max_tokens=100), kept, request(2, n=3), request(5, n=20)):
        engine.submit(r)
    engine.abort("r2")
    events = []
    while not any(event.request_id == "r0" for event in events):
        events += engine.step()
    assert {event.request_id for event in events} <= {"r0", "r1", "r5"}
    for name in ("r0", "r5", "never heard of"):
        engine.abort(name)
    after = finish(engine, [event for event in events if event.request_id == "r1"])
    assert after == {"r1": expected}
    assert tokens(generate(engine, [request(2)])["r2"]) == again


def test_adapters_come_and_go_while_requests_run(engine: Engine, model: Model):
    base, first, second = (
        request(i, adapter=digest, temperature=0, max_tokens=60)
        for i, digest in enumerate((None, "every-layer", "attention"))
    )
    load(engine, model, "every-layer", "rslora", "rslora")  # what is loaded stays
    engine.submit(base)
    engine.submit(first)
    with pytest.raises(InputError, match="adapter every-layer is in use by 1 requests, 'r1' among them"):
        engine.drop_adapter("every-layer")
    events = engine.step()
    engine.drop_adapter("rslora")
    load(engine, model, "attention")
    engine.submit(second)
    assert sorted(engine.adapters()) == ["attention", "every-layer"]
    got = finish(engine, events)
    assert got == {r.request_id: [model.reference.greedy(r)] for r in (base, first, second)}
    engine.drop_adapter("every-layer")
    with pytest.raises(InputError, match="asks for adapter every-layer, which is not loaded"):
        engine.submit(first)
    with pytest.raises(InputError, match="every-layer"):
        engine.drop_adapter("every-layer")


def test_new_weights_under_a_new_digest_are_not_mixed_up_with_the_old(engine: Engine, model: Model):
    """The same prompt again, so that a cached prefix of the other adapter's would show."""
    prompts = [replace(request(9, 64, temperature=0), adapter=digest) for digest in (None, "every-layer", "wide")]
    for r in prompts:
        if r.adapter:
            load(engine, model, r.adapter)
        assert tokens(generate(engine, [r])["r9"]) == [model.reference.greedy(r)], r.adapter
        if r.adapter:
            engine.drop_adapter(r.adapter)


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_new_base_weights_take_effect_for_adapters_too(engine: Engine, model: Model, tmp_path: Path):
    vocabulary = save_tokenizer(tmp_path / "other")
    other = save_model(tmp_path / "other", "llama", seed=9, **WIDE, vocab_size=vocabulary)
    under = Reference(other, {"every-layer": model.adapters["every-layer"]})
    load(engine, model, "every-layer")
    requests = [request(1, 64, temperature=0), request(2, 64, temperature=0, adapter="every-layer")]
    for folder, reference in ((model.folder, model.reference), (other, under), (model.folder, model.reference)):
        engine.load_base(weights(folder))
        got = generate(engine, requests)
        assert [tokens(got[r.request_id]) for r in requests] == [[reference.greedy(r)] for r in requests]


def test_base_weights_that_do_not_fit_or_come_while_requests_run_change_nothing(engine: Engine, model: Model):
    r, old, name = request(1, temperature=0), weights(model.folder), "model.norm.weight"
    for wrong, message in (
        ({k: v for k, v in old.items() if k != name}, f"the weights lack {name}"),
        (old | {name: np.zeros(3, np.float32)}, rf"{name} has the shape \(3,\)"),
        (old | {"model.extra": np.zeros(3, np.float32)}, "the weights have model.extra"),
    ):
        with pytest.raises(InputError, match=message):
            engine.load_base(wrong)
    engine.submit(r)
    with pytest.raises(InputError, match="cannot be replaced while requests run"):
        engine.load_base({k: v * 2 for k, v in old.items()})
    assert finish(engine) == {"r1": [model.reference.greedy(r)]}


def test_weights_that_are_not_finite_fail_their_requests_with_the_reason(engine: Engine, model: Model):
    old, name = weights(model.folder), "model.norm.weight"
    engine.load_base(old | {name: np.full_like(old[name], np.nan)})
    try:
        engine.submit(request(1, n=2))
        with pytest.raises(RequestsFailed, match="the base model gives logits that are not finite") as failed:
            finish(engine)
    finally:
        engine.load_base(old)
    assert failed.value.request_ids == {"r1"}
    r = request(1, temperature=0)
    assert tokens(generate(engine, [r])["r1"]) == [model.reference.greedy(r)]


def test_adapters_that_cannot_be_served_are_refused(engine: Engine, model: Model):
    tensors, config = load_adapter(model.adapters["attention"])
    name = next(iter(tensors))
    for changed, settings, message in (
        (tensors, config | {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({}, config, "the adapter has no tensors"),
        (tensors | {name: np.full_like(tensors[name], np.inf)}, config, "numbers that are not finite"),
    ):
        with pytest.raises(InputError, match=message):
            engine.load_adapter("x", changed, settings)
    assert engine.adapters() == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.arange(120, dtype=np.int32)}, "120 prompt \\+ 12 new tokens, the engine holds 128"),
        ({"prompt": np.array([], np.int32)}, "empty prompt"),
        ({"prompt": np.array([3, 100_000], np.int32)}, "token ids outside of 0 … "),
        ({"prompt": np.array([3, -1], np.int32)}, "token ids outside of 0 … "),
        ({"adapter": "a1b2"}, "adapter a1b2, which is not loaded"),
        ({"n": 0}, "n=0, max_tokens=12: both need 1"),
        ({"sampling": Sampling(max_tokens=0)}, "n=1, max_tokens=0: both need 1"),
        ({"sampling": Sampling(temperature=-1.0, max_tokens=4)}, "temperature -1.0: it must be at least 0"),
        ({"sampling": Sampling(temperature=float("nan"), max_tokens=4)}, "temperature nan: it must be at least 0"),
        ({"sampling": Sampling(top_p=0.0, max_tokens=4)}, "top_p 0.0: it must be above 0 and at most 1"),
        ({"sampling": Sampling(top_k=-1, max_tokens=4)}, "top_k -1: it must be at least 0"),
        ({"sampling": Sampling(min_p=1.5, max_tokens=4)}, "min_p 1.5: it must be from 0 to 1"),
        ({"sampling": Sampling(logit_bias=((99999, 1.0),), max_tokens=4)}, "logit_bias 1.0 for token 99999"),
        ({"sampling": Sampling(logit_bias=((1, float("nan")),), max_tokens=4)}, "logit_bias nan"),
        ({"sampling": Sampling(presence_penalty=float("inf"), max_tokens=4)}, "presence_penalty inf"),
        ({"sampling": Sampling(top_logprobs=21, max_tokens=4)}, "top_logprobs 21: it must be from 0 to 20"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(change: dict[str, Any], message: str, engine: Engine):
    with pytest.raises(InputError, match=message):
        engine.submit(replace(request(1), **change))
    assert not engine.busy


def test_the_same_name_twice_is_refused_while_it_runs(engine: Engine):
    generate(engine, [request(1)])
    engine.submit(request(1))
    with pytest.raises(InputError, match="'r1' is already running"):
        engine.submit(request(1))
    engine.abort("r1")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_the_tokens_of_transformers_generate_too(family: str, shop: Shop, tmp_path: Path):
    folder = save_model(tmp_path / family, family, **FAMILIES[family])
    reference = Reference(folder)
    requests = [request(i, length, temperature=0, max_tokens=30) for i, length in enumerate((1, 5, 31, 40))]
    got = generate(shop.engine(folder), requests)
    for r in requests:
        assert tokens(got[r.request_id]) == [reference.greedy(r)]
