"""Adapters come on demand, stay while they are used, and leave in the order of their last use."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.engine_thread import EngineThread
from raylign.serve.adapter_cache import AdapterCache

from .scripted import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def thread(engine: ScriptedEngine) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: engine)
    yield thread
    thread.close()


class Shelf:
    """Counts how often each adapter is read; reading waits while `held`."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.broken = False

    def read(self, digest: str) -> Any:
        def read() -> tuple[dict[str, Any], dict[str, Any]]:
            self.reads.append(digest)
            if self.broken:
                raise InputError("half a file")
            return {}, {"r": 1}

        return read


def test_an_adapter_asked_for_at_once_is_loaded_once(engine: ScriptedEngine, thread: EngineThread) -> None:
    shelf = Shelf()

    async def use(cache: AdapterCache) -> None:
        async with cache.use("d", shelf.read("d")):
            assert engine.adapters() == ("d",)

    async def main() -> None:
        cache = AdapterCache(thread, 2)
        await asyncio.gather(*(use(cache) for _ in range(5)))

    asyncio.run(main())
    assert shelf.reads == ["d"]
    assert engine.adapters() == ("d",)


def test_the_longest_unused_leaves_and_one_in_use_never(engine: ScriptedEngine, thread: EngineThread) -> None:
    shelf = Shelf()

    async def use(cache: AdapterCache, digest: str) -> None:
        async with cache.use(digest, shelf.read(digest)):
            pass

    async def main() -> None:
        cache = AdapterCache(thread, 2)
        async with cache.use("a", shelf.read("a")):
            async with cache.use("b", shelf.read("b")):
                third = asyncio.ensure_future(use(cache, "c"))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(third), 0.05)
                assert set(engine.adapters()) == {"a", "b"}
            await third
            assert set(engine.adapters()) == {"a", "c"}, "b was idle, a is in use"
        async with cache.use("b", shelf.read("b")):
            assert set(engine.adapters()) == {"a", "b"}, "c was left before a"
        assert set(cache.held()) == {"a", "b"}

    asyncio.run(main())
    assert shelf.reads == ["a", "b", "c", "b"]


def test_one_that_cannot_be_read_is_tried_again(engine: ScriptedEngine, thread: EngineThread) -> None:
    shelf = Shelf()

    async def main() -> None:
        cache = AdapterCache(thread, 1)
        async with cache.use("a", shelf.read("a")):
            pass
        shelf.broken = True
        with pytest.raises(InputError, match="half a file"):
            async with cache.use("b", shelf.read("b")):
                pass
        shelf.broken = False
        async with cache.use("b", shelf.read("b")):
            assert engine.adapters() == ("b",)

    asyncio.run(main())


def test_a_client_that_leaves_while_an_adapter_loads_spoils_nothing(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    shelf = Shelf()

    async def use(cache: AdapterCache) -> None:
        async with cache.use("a", shelf.read("a")):
            pass

    async def main() -> None:
        cache = AdapterCache(thread, 1)
        hasty, patient = asyncio.ensure_future(use(cache)), asyncio.ensure_future(use(cache))
        await asyncio.sleep(0)
        hasty.cancel()
        await patient
        assert engine.adapters() == ("a",)

    asyncio.run(main())
    assert shelf.reads == ["a"]
