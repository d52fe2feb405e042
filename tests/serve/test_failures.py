"""What goes wrong behind the service reaches the official client as its own exceptions, and what is left is well."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from raylign.cluster.weights import save_adapter
from raylign.rollout.engine import TokenEvent
from raylign.serve.config import Limits
from raylign.serve.registry import Registry

from .conftest import CONFIG, Shelf, tensors
from .live import Live, live
from .scripted import ScriptedEngine

ASK: Any = {"model": "first", "prompt": "x", "max_tokens": 20}


@pytest.fixture
def scripted() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def up(shelf: Shelf, scripted: ScriptedEngine) -> Iterator[Live]:
    with live(shelf.registry, "tiny-base", engine=scripted, limits=Limits(request_seconds=0.3)) as made:
        yield made
        scripted.steps.release(10_000)


def test_an_answer_that_takes_too_long_is_ended_in_the_engine_too(up: Live, scripted: ScriptedEngine) -> None:
    scripted.steps = threading.Semaphore(1)
    with up.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        scripted.steps.release(1)
        with pytest.raises(openai.APIError, match="longer than this service allows"):
            for _ in client.completions.create(**ASK, stream=True):
                pass
        scripted.steps.release(10_000)
        assert up.until_idle()
        assert len(scripted.aborted) == 2
        assert client.completions.create(**ASK).choices


def test_a_step_that_fails_is_a_503_and_the_next_request_is_answered(up: Live, scripted: ScriptedEngine) -> None:
    step = scripted.step

    def broken() -> list[TokenEvent]:
        scripted.step = step  # type: ignore[method-assign]
        raise ValueError("no memory")

    with up.client() as client:
        for stream in (False, True):
            scripted.step = broken  # type: ignore[method-assign]
            with pytest.raises(openai.InternalServerError, match="no memory") as caught:
                client.completions.create(**ASK, stream=stream)
            assert caught.value.status_code == 503
        scripted.step = broken  # type: ignore[method-assign]
        assert client.with_options(max_retries=1).completions.create(**ASK).choices


def test_a_stream_that_fails_in_its_middle_ends_in_an_error(up: Live, scripted: ScriptedEngine) -> None:
    def broken() -> list[TokenEvent]:
        raise ValueError("no memory")

    scripted.steps = threading.Semaphore(3)
    with up.client() as client:
        chunks = iter(client.completions.create(**ASK, stream=True))
        assert next(chunks).choices
        scripted.step = broken  # type: ignore[method-assign]
        scripted.steps.release(100)
        with pytest.raises(openai.APIError, match="no memory"):
            list(chunks)


def test_an_adapter_whose_files_were_swapped_is_not_served(shelf: Shelf, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    shutil.copytree(shelf.registry.root, registry.root)
    _, folder = save_adapter(tmp_path / "adapters", tensors(7), CONFIG, {"base_digest": shelf.base.digest})
    registry.promote("third", registry.publish(folder, shelf.base).digest)
    _, other = save_adapter(tmp_path / "others", tensors(8), CONFIG, {"base_digest": shelf.base.digest})
    for file in other.iterdir():
        shutil.copy(file, folder)
    with live(registry, "tiny-base") as up, up.client() as client:
        with pytest.raises(openai.InternalServerError, match="cannot be loaded") as caught:
            client.completions.create(**ASK | {"model": "third"})
        assert (caught.value.status_code, caught.value.code) == (503, "adapter_failed")
        assert str(tmp_path) not in str(caught.value)
        assert client.completions.create(**ASK).choices


def test_more_adapters_than_places_are_answered_as_each_alone(shelf: Shelf, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    shutil.copytree(shelf.registry.root, registry.root)
    digests = [shelf.first.digest, shelf.second.digest]
    for seed in range(20, 24):
        _, folder = save_adapter(tmp_path / "adapters", tensors(seed), CONFIG, {"base_digest": shelf.base.digest})
        digests.append(registry.publish(folder, shelf.base).digest)

    def ask(client: openai.OpenAI, number: int) -> str:
        model = digests[number % len(digests)]
        return client.completions.create(model=model, prompt="x", max_tokens=12, seed=number).choices[0].text

    with live(registry, "tiny-base", limits=Limits(adapters=2)) as up, up.client() as client:
        alone = [ask(client, number) for number in range(24)]
        together: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda n=number: together.update({n: ask(client, n)})) for number in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(up.engine.adapters()) <= 2
    assert [together[number] for number in range(24)] == alone
    assert len(set(alone)) > 10
