"""The service on the real Ray Serve, asked by the official client."""

import asyncio
import concurrent.futures
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from raylign.cluster.errors import DoesNotFit, InputError
from raylign.serve.config import Limits, ServeConfig
from raylign.serve.deploy import _check_host, start, stop
from raylign.serve.keys import add_key, keys_path
from raylign.serve.registry import Registry

from .conftest import Shelf

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def url(ray_session: str, shelf: Shelf) -> Iterator[str]:
    config = ServeConfig(alias="first", slots=16, max_length=4096)
    yield start(config, name="test-service", base=Path(shelf.base.path), registry=shelf.registry.root)
    stop("test-service")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def _say(client: openai.OpenAI, model: str, **options: object) -> str:
    asked = {"max_tokens": 12, "temperature": 0, "messages": ASK} | options
    return client.chat.completions.create(model=model, **asked).choices[0].message.content  # type: ignore[call-overload]


def test_alias_digest_and_prefix_are_the_same_model_and_base_is_another(client: openai.OpenAI, shelf: Shelf) -> None:
    said = {_say(client, name) for name in ("first", shelf.first.digest, shelf.first.digest[:12])}
    assert len(said) == 1
    others = {_say(client, name) for name in ("second", "tiny-base", shelf.base.digest)}
    assert len(others) == 2
    assert not said & others


def test_answers_carry_the_digest(client: openai.OpenAI, shelf: Shelf) -> None:
    raw = client.chat.completions.with_raw_response.create(model="first", messages=ASK, max_tokens=2)  # type: ignore[arg-type]
    assert raw.headers["x-raylign-digest"] == shelf.first.digest
    assert raw.parse().system_fingerprint == shelf.first.digest


def test_base_answers_as_transformers_does(client: openai.OpenAI, shelf: Shelf) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shelf.base.path)
    text = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(shelf.base.path)
    with torch.no_grad():
        made = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    answer = client.chat.completions.create(model="tiny-base", messages=ASK, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == tokenizer.decode(made, skip_special_tokens=True)
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt.shape[1], len(made))


@pytest.mark.parametrize("model", ["first", "tiny-base"])
def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "messages": ASK, "max_tokens": 40, "seed": 3, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        logprobs = [item.logprob for part in parts if part.logprobs for item in part.logprobs.content]
        assert logprobs == [item.logprob for item in choice.logprobs.content]
    assert len(chunks) > 20
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_completions_take_text_tokens_and_lists(client: openai.OpenAI) -> None:
    options = {"model": "first", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(prompt=["ab", "cd"], logprobs=0, **options)  # type: ignore[call-overload]
    assert [choice.index for choice in whole.choices] == [0, 1]
    singles = [client.completions.create(prompt=text, **options).choices[0].text for text in ("ab", "cd")]  # type: ignore[call-overload]
    assert [choice.text for choice in whole.choices] == singles
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    streamed = client.completions.create(prompt="ab", stream=True, **options)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in streamed) == singles[0]


def test_a_seed_makes_an_answer_again_and_without_one_it_differs(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.0, "max_tokens": 30}
    assert _say(client, "first", seed=5, **hot) == _say(client, "first", seed=5, **hot)
    assert _say(client, "first", seed=5, **hot) != _say(client, "first", seed=6, **hot)
    assert _say(client, "first", **hot) != _say(client, "first", **hot)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    whole = _say(client, "tiny-base", max_tokens=30)
    stop = whole[8:10]
    answer = client.chat.completions.create(model="tiny-base", messages=ASK, max_tokens=30, temperature=0, stop=[stop])  # type: ignore[arg-type]
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed(client: openai.OpenAI, shelf: Shelf) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) >= {"first", "second", "tiny-base"}
    assert listed["first"].model_extra == {"root": shelf.first.digest, "parent": shelf.base.digest}
    assert client.models.retrieve("first") == listed["first"]


def test_a_model_registered_later_is_served_at_once(client: openai.OpenAI, shelf: Shelf) -> None:
    shelf.registry.promote("later", shelf.second.digest)
    assert _say(client, "later") == _say(client, "second")


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'") as caught:
        _say(client, "nobody")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"best": 1}}, "best"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 1000000}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stop": ""}, "stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, object], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _say(client, "first", **options)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[1]", 400),
        ("POST", "/v1/chat/completions", b'{"model": "first", "temperature": NaN, "messages": []}', 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("GET", "/v1/models/..%2ffirst", None, 404),
        ("GET", "/v1/models/%00", None, 404),
    ],
)
def test_every_error_has_openais_shape(url: str, method: str, path: str, content: bytes | None, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, url + path, content=content, headers=headers, trust_env=False)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_requests_at_once_equal_the_same_requests_alone(client: openai.OpenAI, shelf: Shelf) -> None:
    asks = [(("first", "second", "tiny-base")[i % 3], {"seed": i, "temperature": 1.0}) for i in range(24)]
    alone = [_say(client, model, **options) for model, options in asks]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda ask: _say(client, ask[0], **ask[1]), asks))
    assert together == alone


def test_requests_at_once_share_steps(client: openai.OpenAI) -> None:
    def timed(count: int) -> float:
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda i: _say(client, "first", max_tokens=120, temperature=1.0, seed=i), range(count)))
        return time.perf_counter() - start

    one = min(timed(1) for _ in range(3))
    assert min(timed(16) for _ in range(3)) < 8 * one, "sixteen one after the other would take sixteen times as long"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(url: str, stream: bool) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as hasty:
            ask = hasty.completions.create(model="first", prompt="x", n=16, max_tokens=4000, stream=stream)
            task = asyncio.ensure_future(ask)
            assert await asyncio.to_thread(_engine_is, url, busy=True, seconds=10)
            if stream:
                await (await task).close()
            else:
                task.cancel()
                await asyncio.wait([task])

    began = time.monotonic()
    asyncio.run(leave())
    assert _engine_is(url, busy=False, seconds=10)
    assert time.monotonic() - began < 5, "4000 tokens of 16 rows take longer than that to their end"


def _engine_is(url: str, *, busy: bool, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/health", trust_env=False).json()["busy"] == busy:
            return True
    return False


def test_another_host_is_refused(ray_session: str, shelf: Shelf) -> None:
    with pytest.raises(InputError, match=r"0\.0\.0\.0.*not loopback"):
        start(
            ServeConfig(alias="a", host="0.0.0.0"),
            name="open",
            base=Path(shelf.base.path),
            registry=shelf.registry.root,
        )


def test_with_keys_another_host_is_taken_and_rays_http_asks_for_one(
    ray_session: str, shelf: Shelf, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    shutil.copytree(shelf.registry.root, registry.root)
    secret = add_key(keys_path(registry.root), "me", models=("first",))
    _check_host("0.0.0.0", registry.root)
    config = ServeConfig(alias="first", slots=8, max_length=64, limits=Limits(body_bytes=2000))
    locked = start(config, name="locked", base=Path(shelf.base.path), registry=registry.root)
    try:
        with httpx.Client(trust_env=False) as plain:
            for path in ("/v1/models", "/nowhere", "/openapi.json", "/metrics"):
                assert plain.get(locked + path).status_code == 401
            large = plain.post(f"{locked}/v1/completions", content=b" " * 3000, headers=_bearer(secret))
            assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        with openai.OpenAI(base_url=f"{locked}/v1", api_key=secret, max_retries=0) as mine:
            assert [model.id for model in mine.models.list()] == ["first"]
            assert _say(mine, "first", max_tokens=3)
    finally:
        stop("locked")


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_service_without_a_place_says_what_it_asked_for(url: str, shelf: Shelf) -> None:
    from raylign.cluster.config import Resources

    config = ServeConfig(alias="a", resources=Resources(cpus=1000))
    with pytest.raises(DoesNotFit, match=r"serve replica 1 × 1000 CPU"):
        start(config, name="huge", base=Path(shelf.base.path), registry=shelf.registry.root, timeout=3)


def test_a_service_finds_no_room_beside_others(url: str, ray_session: str, shelf: Shelf) -> None:
    import ray
    from raylign.cluster.config import Resources

    room = int(ray.cluster_resources()["CPU"])
    config = ServeConfig(alias="a", resources=Resources(cpus=room))
    with pytest.raises(DoesNotFit, match=f"'large' has no place: 1 replicas with {room} CPUs"):
        start(config, name="large", base=Path(shelf.base.path), registry=shelf.registry.root, timeout=3)


def test_a_port_that_is_taken_is_refused(shelf: Shelf) -> None:
    from raylign.serve.deploy import _free_port

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"serve.port {port} on 127.0.0.1 can't be used"):
            _free_port("127.0.0.1", port)


def test_a_second_port_on_one_ray_is_refused(url: str, shelf: Shelf) -> None:
    config = ServeConfig(alias="a", port=1)
    with pytest.raises(InputError, match=f"serve.port 1: this Ray already serves on port {url.rsplit(':', 1)[1]}"):
        start(config, name="other", base=Path(shelf.base.path), registry=shelf.registry.root)


def test_two_services_share_a_ray(url: str, client: openai.OpenAI, shelf: Shelf) -> None:
    config = ServeConfig(alias="first", slots=8, max_length=64)
    second = start(config, name="second-service", base=Path(shelf.base.path), registry=shelf.registry.root)
    try:
        assert second == f"{url}/second-service"
        with openai.OpenAI(base_url=f"{second}/v1", api_key="none", max_retries=0) as other:
            assert _say(other, "first") == _say(client, "first")
    finally:
        stop("second-service")
    assert _say(client, "first")
