"""What a hostile client may try over HTTP; it all holds under `python -O` too, where no `assert` of ours is left."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from raylign.serve.config import Limits
from raylign.serve.gate import PUBLIC
from raylign.serve.keys import add_key, keys_path
from raylign.serve.registry import Registry

from .conftest import Shelf
from .live import Live, live

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ASK: Any = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Locked:
    """A service with keys: `admin` for all models, `alice` for `first`, `bob` for `second` and few tokens."""

    live: Live
    admin: str
    alice: str
    bob: str


@pytest.fixture(scope="module")
def locked(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    root = tmp_path_factory.mktemp("locked") / "registry"
    shutil.copytree(shelf.registry.root, root)
    keys = keys_path(root)
    limits = Limits(completions=4, body_bytes=100_000, body_seconds=0.5, request_seconds=20)
    with live(Registry(root), "tiny-base", limits=limits) as up:
        yield Locked(
            up,
            add_key(keys, "admin"),
            add_key(keys, "alice", models=("first",)),
            add_key(keys, "bob", models=("second",), requests_per_minute=60, tokens_per_minute=100),
        )


def _is_openais(answer: httpx.Response) -> bool:
    return set(answer.json()["error"]) == {"message", "type", "param", "code"}


def _paths(up: Live) -> list[str]:
    return [route.path.replace("{name}", "first") for route in up.app.routes]


WRONG: dict[str, list[tuple[str, str]]] = {
    "no key": [],
    "empty": [("authorization", "Bearer")],
    "another key": [("authorization", "Bearer rl-" + "A" * 43)],
    "10 KB": [("authorization", "Bearer " + "x" * 10_000)],
    "another scheme": [("authorization", "Basic YTpi")],
    "two at once": [("authorization", "Bearer a"), ("authorization", "Bearer b")],
    "another header": [("x-api-key", "a"), ("cookie", "key=a")],
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
def test_every_route_and_method_is_denied_without_a_key(locked: Locked, headers: list[tuple[str, str]]) -> None:
    paths = _paths(locked.live)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/openapi.json"} <= set(paths)
    with httpx.Client(base_url=locked.live.url, trust_env=False) as client:
        for path in (*paths, "/nowhere", "/v1", "/health/", "//health", "/ready/../metrics", "/%68ealth/x"):
            if path in PUBLIC:
                continue
            for method in METHODS:
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert method == "HEAD" or _is_openais(answer)
                assert answer.headers["www-authenticate"] == "Bearer"


def test_the_hash_of_a_key_and_a_key_in_the_address_open_nothing(locked: Locked) -> None:
    stored = json.loads(keys_path(locked.live.service._registry.root).read_text())["keys"][0]["sha256"]
    for secret in (stored, locked.admin.lower(), locked.admin[:-1], locked.admin + "a"):
        answer = httpx.get(f"{locked.live.url}/v1/models", headers=_bearer(secret), trust_env=False)
        assert answer.status_code == 401
    answer = httpx.get(f"{locked.live.url}/v1/models?api_key={locked.admin}", trust_env=False)
    assert answer.status_code == 401


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_probes_say_yes_or_no_and_nothing_else(locked: Locked) -> None:
    assert httpx.get(f"{locked.live.url}/health", trust_env=False).json() == {"status": "ok"}
    assert httpx.get(f"{locked.live.url}/ready", trust_env=False).json() == {"status": "ready"}


def test_another_tenants_models_are_as_if_they_were_not_there(locked: Locked, shelf: Shelf) -> None:
    with locked.live.client(locked.alice) as alice:
        assert [model.id for model in alice.models.list()] == ["first"]
        for name in ("first", shelf.first.digest, shelf.first.digest[:12]):
            assert alice.completions.create(model=name, prompt="x", max_tokens=1).model == name
        messages = set()
        for name in ("second", shelf.second.digest, "tiny-base", "nobody"):
            with pytest.raises(openai.NotFoundError) as of_answer:
                alice.completions.create(model=name, prompt="x", max_tokens=1)
            with pytest.raises(openai.NotFoundError) as of_model:
                alice.models.retrieve(name)
            assert str(of_answer.value) == str(of_model.value)
            messages.add(str(of_answer.value).replace(name, "…"))
        assert len(messages) == 1, "what one may not use and what is not there look alike"


NAMES = {
    "parent": "../aliases/first",
    "encoded": "%2e%2e%2faliases%2ffirst",
    "twice encoded": "%252e%252e%252ffirst",
    "NUL": "first\0",
    "look-alike": "f\u0456rst",
    "wide": "\uff46irst",
    "space": "first ",
    "newline": "first\n",
    "glob": "f*",
    "hex glob": "[0-9a-f]" * 8,
    "dots": "..",
    "absolute": "/etc/passwd",
    "a surrogate's escape": "\\ud800",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_that_lead_elsewhere_lead_nowhere(served: Live, name: str) -> None:
    answer = served.post("/v1/completions", {"model": name, "prompt": "x"})
    assert answer.status_code == 404
    assert _is_openais(answer)
    quoted = name.encode().hex(" ").split()
    answer = httpx.get(f"{served.url}/v1/models/%{'%'.join(quoted)}", trust_env=False)
    assert answer.status_code == 404
    assert _is_openais(answer)


BODIES: dict[str, tuple[bytes, int]] = {
    "10 KB name": (b'{"model": "' + b"a" * 10_240 + b'", "prompt": "x"}', 400),
    "max_tokens 10^9": (b'{"model": "first", "prompt": "x", "max_tokens": 1000000000}', 400),
    "max_tokens 10^400": (b'{"model": "first", "prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}", 400),
    "5000 digits": (b'{"model": "first", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
    "n 10^6": (b'{"model": "first", "prompt": "x", "n": 1000000}', 400),
    "many prompts": (b'{"model": "first", "prompt": [' + b'"x",' * 999 + b'"x"]}', 400),
    "n times prompts": (b'{"model": "first", "prompt": ["x", "y"], "n": 128}', 400),
    "NaN": (b'{"model": "first", "prompt": "x", "temperature": NaN}', 400),
    "Infinity": (b'{"model": "first", "prompt": "x", "temperature": 1e999}', 400),
    "temperature true": (b'{"model": "first", "prompt": "x", "temperature": {}}', 400),
    "deep lists": (b"[" * 50_000, 400),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400),
    "deep in a field": (b'{"model": "first", "prompt": ' + b"[" * 199 + b"]" * 199 + b"}", 400),
    "quotes without end": (b'"\\"' * 20_000, 400),
    "not UTF-8": (b'{"model": "first", "prompt": "\xff\xfe"}', 400),
    "half a pair": (b'{"model": "first", "prompt": "\\ud800"}', 400),
    "a key twice": (b'{"model": "nobody", "model": "first", "prompt": 5}', 400),
    "token -1": (b'{"model": "first", "prompt": [-1]}', 400),
    "token 2^40": (b'{"model": "first", "prompt": [1099511627776]}', 400),
    "token 10^6": (b'{"model": "first", "prompt": [1000000]}', 400),
    "no prompt": (b'{"model": "first", "prompt": []}', 400),
    "empty prompt": (b'{"model": "first", "prompt": ""}', 400),
    "too long": (b'{"model": "first", "prompt": "' + b"x" * 5000 + b'"}', 400),
    "nothing": (b"", 400),
    "null": (b"null", 400),
    "a model that is null": (b'{"model": null, "prompt": "x"}', 400),
}


@pytest.mark.parametrize(("body", "status"), BODIES.values(), ids=BODIES.keys())
def test_bodies_that_ask_for_too_much_or_are_broken(served: Live, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(served.url + path, content=body, headers=headers, trust_env=False, timeout=10)
        assert answer.status_code == status
        assert _is_openais(answer)
    assert served.until_idle()


def test_100_mb_are_refused_before_they_are_read(served: Live) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    began = time.monotonic()
    with _connect(served) as wire:  # declared: not a byte of it is waited for
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 104857600\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")
    try:  # not declared: refused once it is too much, whether or not the client has noticed
        answer = httpx.post(f"{served.url}/v1/completions", content=chunks(), trust_env=False)
        assert answer.status_code == 413
    except httpx.TransportError:
        pass
    assert time.monotonic() - began < 5
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "٣", "99999999999999999999999999"])
def test_a_length_that_is_none_is_refused(served: Live, length: str) -> None:
    with _connect(served) as wire:
        wire.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{{}}".encode())
        assert wire.recv(4096)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def _connect(up: Live) -> socket.socket:
    address = urlsplit(up.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=20)


def test_a_request_that_drips_is_ended(locked: Locked) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {locked.admin}\r\n"
    with _connect(locked.live) as wire:
        wire.sendall(f"{head}content-length: 5000\r\n\r\n{{".encode())
        began = time.monotonic()
        assert wire.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(served: Live, stream: bool) -> None:
    body = json.dumps({"model": "first", "prompt": "x", "n": 8, "max_tokens": 1000, "stream": stream}).encode()
    for _ in range(3):
        with _connect(served) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
            wire.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
            deadline = time.monotonic() + 10
            while not served.engine.busy and time.monotonic() < deadline:
                time.sleep(0.001)
            assert served.engine.busy
        began = time.monotonic()
        assert served.until_idle()
        assert time.monotonic() - began < 1.5, "8 rows of 1000 tokens take longer to their end"
    assert served.service._admission.inside == 0


def test_a_reader_that_does_not_read_is_let_go(shelf: Shelf) -> None:
    limits = Limits(request_seconds=0.4)
    with live(shelf.registry, "tiny-base", limits=limits) as up, closing(_connect(up)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        body = json.dumps({"model": "first", "prompt": "x", "n": 8, "max_tokens": 1000, "stream": True, "logprobs": 5})
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
        wire.sendall(f"content-length: {len(body)}\r\n\r\n{body}".encode())
        assert wire.recv(64).startswith(b"HTTP/1.1 200")
        assert up.until_idle(20)
        assert _becomes(lambda: up.service._admission.inside == 0, 10)


def _becomes(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_too_many_at_once_are_told_when_to_come_again(locked: Locked) -> None:
    with locked.live.client(locked.admin) as client:
        held: Any = client.completions.create(model="first", prompt="x", n=4, max_tokens=900, stream=True)
        next(iter(held))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="first", prompt="x", max_tokens=1)
        assert caught.value.code == "overloaded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 31
        ready = httpx.get(f"{locked.live.url}/ready", trust_env=False)
        assert ready.status_code == 503
        held.close()
        assert locked.live.until_idle()
        patient = client.with_options(max_retries=2)
        assert patient.completions.create(model="first", prompt="x", max_tokens=1).choices


def test_a_key_that_has_used_its_tokens_waits(locked: Locked) -> None:
    with locked.live.client(locked.bob) as bob:
        bob.completions.create(model="second", prompt="x" * 90, max_tokens=60)
        with pytest.raises(openai.RateLimitError, match="100 tokens a minute") as caught:
            bob.completions.create(model="second", prompt="x", max_tokens=1)
        assert 20 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_all_of_it_without_asserts() -> None:
    if not __debug__:
        pytest.skip("this is that run")
    command = [sys.executable, "-O", "-m", "pytest", __file__, "-x", "-v", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[2]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
