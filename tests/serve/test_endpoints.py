"""Every field of every endpoint, asked by the official client of the application over the native engine."""

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from .conftest import Shelf
from .live import Live

ASK: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(served: Live) -> Any:
    with served.client() as client:
        yield client


def test_likeliest_tokens_come_with_each_and_bytes_are_the_tokens_own(client: Any) -> None:
    asked = {"model": "first", "messages": ASK, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 4}
    whole = client.chat.completions.create(**asked)
    content = whole.choices[0].logprobs.content
    assert len(content) == 6
    for item in content:
        best = [top.logprob for top in item.top_logprobs]
        assert len(best) == 4
        assert best == sorted(best, reverse=True)
        assert item.logprob <= best[0]
        assert len(item.bytes) == 1 or item.token == "<|im_start|>", "the tokenizer has a token for every byte"
    chunks = client.chat.completions.create(**asked, stream=True)
    parts = [p for c in chunks if c.choices and c.choices[0].logprobs for p in c.choices[0].logprobs.content]
    assert parts == content


def test_completions_have_their_own_form_of_log_probs(client: Any) -> None:
    said = client.completions.create(model="first", prompt="ab", max_tokens=5, logprobs=3, seed=2).choices[0].logprobs
    assert [len(said.tokens), len(said.token_logprobs), len(said.text_offset)] == [5, 5, 5]
    assert all(0 < len(top) <= 3 for top in said.top_logprobs)
    assert said.text_offset[0] == 0
    plain = client.completions.create(model="first", prompt="ab", max_tokens=5, logprobs=0, seed=2).choices[0].logprobs
    assert plain.top_logprobs is None
    assert plain.token_logprobs == said.token_logprobs


def test_a_bias_and_a_penalty_change_what_is_said(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-base", "prompt": "x", "max_tokens": 40, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, logit_bias={"68": 100}).choices[0].text != plain
    other = client.completions.create(**asked, logprobs=0, frequency_penalty=2, presence_penalty=2).choices[0]
    assert len(set(other.logprobs.tokens)) > len(set(plain))


def test_a_stop_string_ends_the_answer_before_it(client: Any) -> None:
    asked: dict[str, Any] = {"model": "first", "prompt": "ab", "max_tokens": 30, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    stop = plain[5:7]
    cut = client.completions.create(**asked, stop=[stop, "never said"]).choices[0]
    assert cut.text == plain[: plain.index(stop)]
    assert cut.finish_reason == "stop"


def test_the_same_seed_gives_the_same_answers_and_n_gives_several(client: Any) -> None:
    asked: dict[str, Any] = {"model": "second", "messages": ASK, "max_completion_tokens": 10, "n": 4}
    first, again, other = (client.chat.completions.create(**asked, seed=seed) for seed in (5, 5, 6))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_a_schema_is_json_of_it(client: Any, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"model": "first", "messages": ASK, "response_format": form, "n": 3, "seed": 4}
    if stream:
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        whole = client.chat.completions.create(**asked)
        texts = [choice.message.content for choice in whole.choices]
        assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_json_object_begins_and_goes_on_as_one(client: Any) -> None:
    form: Any = {"type": "json_object"}
    asked: dict[str, Any] = {"model": "first", "messages": ASK, "response_format": form, "logit_bias": {"95": 50}}
    for seed in range(4):
        said = client.chat.completions.create(**asked, seed=seed, max_tokens=200).choices[0]
        assert said.message.content.startswith("{")
        if said.finish_reason == "stop":
            assert isinstance(json.loads(said.message.content), dict)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nonsense"}, "Invalid type"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"$ref": "http://127.0.0.1/schema"}, "not present"),
        ({"type": "object", "description": "x" * 70_000}, "more than 65536"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(client: Any, schema: Any, says: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(model="first", messages=ASK, response_format=form)


def test_models_probes_and_metrics(client: Any, served: Live, shelf: Shelf) -> None:
    assert {"first", "second", "tiny-base"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("first").root == shelf.first.digest
    assert httpx.get(f"{served.url}/ready", trust_env=False).json() == {"status": "ready"}
    assert httpx.get(f"{served.url}/health", trust_env=False).json()["status"] == "ok"
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    assert 'raylign_requests_total{route="/v1/models",status="200"}' in page
    assert "raylign_first_token_seconds_bucket" in page


def test_a_body_that_is_not_sent_as_json_is_told_so(served: Live) -> None:
    for content, headers in ((b'{"model": "first"}', {"content-type": "text/plain"}), (b"", {})):
        answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers, trust_env=False)
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]


def test_the_asynchronous_client_streams_many_at_once(served: Live) -> None:
    async def say(client: openai.AsyncOpenAI, i: int) -> tuple[str, Any]:
        text, counts = "", None
        model = ("first", "second", "tiny-base")[i % 3]
        options: Any = {"stream": True, "stream_options": {"include_usage": True}, "seed": i}
        async for chunk in await client.chat.completions.create(model=model, messages=ASK, max_tokens=15, **options):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            counts = chunk.usage or counts
        return text, counts

    async def main() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await say(client, i) for i in range(9)]
            return alone, list(await asyncio.gather(*(say(client, i) for i in range(9))))

    alone, together = asyncio.run(main())
    assert alone == together
    assert all(counts.completion_tokens <= 15 for _, counts in alone)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"best_of": 2}}, "best_of"),
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, None),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_supported_is_refused_by_name(client: Any, options: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "first", "messages": ASK, "max_tokens": 2} | options)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
