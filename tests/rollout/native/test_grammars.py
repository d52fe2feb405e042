"""A grammar decides which texts a random model may write, row by row, and changes no other row."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from raylign.cluster.errors import InputError
from raylign.rollout.engine import RequestsFailed, completion_of, generate
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.records import Completion, GenerationRequest, Sampling, SeedKey
from transformers import AutoTokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["a", "bc"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[NativeEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield NativeEngine(tiny_model, slots=8, max_length=256)
    torch.set_num_threads(threads)


def _request(name: str, grammar: str, seed: int = 0, n: int = 1, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt=np.array([5, 6, 7], np.int32),
        sampling=Sampling(**{"max_tokens": 60, "stop_token_ids": (2,), "grammar": grammar} | sampling),
        seed=SeedKey(seed, 0, 0),
        n=n,
    )


def test_every_sample_is_json_of_the_schema_and_ends_by_itself(engine: NativeEngine, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    done = generate(engine, [_request("a", GRAMMAR, n=12), _request("greedy", GRAMMAR, temperature=0)])
    texts = [tokenizer.decode(c.tokens) for row in done.values() for c in row]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 4
    assert {c.finish_reason for row in done.values() for c in row} == {"stop"}
    assert all(np.isfinite(c.logprobs).all() for row in done.values() for c in row)


def test_rows_without_a_grammar_have_the_same_bits_beside_it(engine: NativeEngine) -> None:
    free = replace(_request("free", "", n=3), adapter=None)
    alone = generate(engine, [free])["free"]
    beside = generate(engine, [_request("a", GRAMMAR, n=3), free])["free"]
    assert [_bits(c) for c in beside] == [_bits(c) for c in alone]


def _bits(completion: Completion) -> tuple[bytes, bytes]:
    return completion.tokens.tobytes(), completion.logprobs.tobytes()


def test_a_sample_that_goes_on_is_in_the_middle_of_its_text(engine: NativeEngine) -> None:
    whole = _request("a", GRAMMAR)
    made = generate(engine, [whole])["a"][0].tokens
    rest = replace(whole, prompt=np.concatenate([whole.prompt, made[:5]]), drawn=5)
    assert generate(engine, [rest])["a"][0].tokens.tolist() == made[5:].tolist()


def test_likeliest_tokens_that_the_grammar_forbids_have_no_probability(engine: NativeEngine) -> None:
    first = generate(engine, [_request("a", GRAMMAR, top_logprobs=3, max_tokens=1)])["a"][0]
    assert first.top is not None
    assert first.logprobs.tolist() == [0.0], "the text can only begin with a brace"
    assert first.top.logprobs.tolist() == [[0.0, -np.inf, -np.inf]]


def test_what_is_no_grammar_is_refused(engine: NativeEngine) -> None:
    with pytest.raises(InputError, match="the grammar cannot be used: Invalid type: nonsense"):
        engine.submit(_request("a", LLMatcher.grammar_from_json_schema({"type": "nonsense"})))
    assert not engine.busy


def test_a_grammar_that_is_too_much_fails_its_request_alone(engine: NativeEngine) -> None:
    schema = {
        "anyOf": [
            {
                "type": "object",
                "properties": {f"k{j}": {"type": "string", "pattern": f".*{i}.*{j}.*"} for j in range(20)},
            }
            for i in range(50)
        ]
    }
    free = _request("free", "")
    alone = generate(engine, [free])["free"]
    engine.submit(_request("huge", LLMatcher.grammar_from_json_schema(schema), max_tokens=50))
    engine.submit(free)
    events, failed = [], []
    while engine.busy:
        try:
            events += engine.step()
        except RequestsFailed as error:
            failed.append(error)
    (error,) = failed
    assert "a grammar cannot go on" in str(error)
    assert error.request_ids == {"huge"}
    assert _bits(completion_of([e for e in events if e.request_id == "free"])) == _bits(alone[0])
