"""Replicas on the real Ray Serve come and go under load: updated, killed, taken away and brought back."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from pydantic import ValidationError
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]
from raylign.cluster.config import Resources
from raylign.cluster.errors import DoesNotFit
from raylign.serve.config import Replicas, ServeConfig
from raylign.serve.deploy import start, stop

from .conftest import Shelf

NAME = "replicas"


def test_a_number_of_replicas_is_both_bounds() -> None:
    two = Replicas.model_validate(2)
    assert (two.min, two.max, two.start) == (2, 2, 2)
    assert Replicas(min=0, max=3).start == 1
    with pytest.raises(ValidationError, match="needs min <= max, not 3 and 2"):
        Replicas(min=3, max=2)


@pytest.mark.slow
def test_a_replica_that_dies_under_load_costs_no_more_than_what_it_was_answering(
    ray_session: str, shelf: Shelf
) -> None:
    with _service(shelf, replicas=2) as url, _load(url, shelf, retries=0) as seen:
        _until(lambda: seen.right > 20)
        victim, *_ = _pids()
        asking = seen.asking
        os.kill(victim, signal.SIGKILL)
        _until(lambda: len(_pids()) == 2 and victim not in _pids())
        recovered = seen.right
        _until(lambda: seen.right > recovered + 20)
    assert not seen.wrong
    assert seen.errors.total() <= asking
    assert set(seen.errors) <= {"InternalServerError", "APIConnectionError"}  # the client's own retries mend both


@pytest.mark.slow
def test_an_official_client_that_retries_sees_nothing_of_a_death(ray_session: str, shelf: Shelf) -> None:
    with _service(shelf, replicas=2) as url, _load(url, shelf, retries=5) as seen:
        _until(lambda: seen.right > 20)
        os.kill(_pids()[0], signal.SIGKILL)
        killed = seen.right
        _until(lambda: seen.right > killed + 40)
    assert not seen.wrong
    assert not seen.errors


@pytest.mark.slow
def test_an_update_under_load_fails_no_request(ray_session: str, shelf: Shelf) -> None:
    with _service(shelf, replicas=1) as url, _load(url, shelf, retries=0) as seen:
        _until(lambda: seen.right > 20)
        (old,) = _pids()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            long: Any = {"model": "first", "prompt": "x", "max_tokens": 400, "temperature": 0}
            stream = iter(client.completions.create(**long, stream=True))
            pieces = [next(stream).choices[0].text]
            assert _start(shelf, replicas=1, slots=8) == url
            pieces += [chunk.choices[0].text for chunk in stream]
            _until(lambda: old not in _pids() and len(_pids()) == 1)
            whole = client.completions.create(**long).choices[0].text
        updated = seen.right
        _until(lambda: seen.right > updated + 20)
    assert "".join(pieces) == whole
    assert not seen.wrong
    assert not seen.errors


@pytest.mark.slow
def test_an_update_without_room_leaves_the_old_replica_answering(ray_session: str, shelf: Shelf) -> None:
    room = int(ray.cluster_resources()["CPU"])
    with _service(shelf, replicas=1) as url:
        with pytest.raises(DoesNotFit, match="has no place"):
            _start(shelf, replicas=1, resources=Resources(cpus=room), timeout=5.0)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model="first", prompt="x", max_tokens=3).choices


@pytest.mark.slow
def test_an_idle_service_has_no_replica_and_the_next_request_brings_one(ray_session: str, shelf: Shelf) -> None:
    idle = Replicas(min=0, max=1, idle_seconds=1)
    with (
        _service(shelf, replicas=idle) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        ask: Any = {"model": "first", "prompt": "x", "max_tokens": 8, "temperature": 0}
        before = client.completions.create(**ask).choices[0].text
        _until(lambda: not _pids())
        assert client.completions.create(**ask).choices[0].text == before
        assert len(_pids()) == 1


@contextmanager
def _service(shelf: Shelf, **fields: Any) -> Iterator[str]:
    yield _start(shelf, **fields)
    stop(NAME)


def _start(shelf: Shelf, *, timeout: float = 120.0, **fields: Any) -> str:
    config = ServeConfig(alias="first", max_length=512, **{"slots": 16} | fields)
    base = Path(shelf.base.path)
    return start(config, name=NAME, base=base, registry=shelf.registry.root, timeout=timeout)


def _pids() -> list[int]:
    """Of the replicas that run, oldest first."""
    client = _get_global_client()
    assert client
    (deployment,) = client.get_serve_details()["applications"][NAME]["deployments"].values()
    running = [replica for replica in deployment["replicas"] if replica["state"] == "RUNNING"]
    return [replica["pid"] for replica in sorted(running, key=lambda replica: replica["start_time_s"])]


def _until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


class _Seen:
    """What clients got: `right` counts answers that equal the same request alone, `wrong` keeps others."""

    def __init__(self) -> None:
        self.right = 0
        self.asking = 0
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()


@contextmanager
def _load(url: str, shelf: Shelf, *, retries: int, clients: int = 4) -> Iterator[_Seen]:
    """Ask for two adapters from some threads until the block ends."""
    seen, over, lock = _Seen(), threading.Event(), threading.Lock()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=120)

    def ask(model: str) -> str:
        return client.completions.create(model=model, prompt="x", max_tokens=24, temperature=0).choices[0].text

    alone = {model: ask(model) for model in ("first", "second")}

    def go(number: int) -> None:
        model = ("first", "second")[number % 2]
        while not over.is_set():
            with lock:
                seen.asking += 1
            try:
                text = ask(model)
            except openai.APIError as error:
                with lock:
                    seen.errors[type(error).__name__] += 1
            else:
                with lock:
                    seen.right += text == alone[model]
                    seen.wrong += [text] if text != alone[model] else []
            finally:
                with lock:
                    seen.asking -= 1

    threads = [threading.Thread(target=go, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
        client.close()
