"""Handlers of one event loop share an engine on its own thread; each gets its own tokens, errors and aborts."""

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.rollout.engine import RequestsFailed, TokenEvent
from raylign.rollout.engine_thread import EngineThread
from raylign.rollout.records import GenerationRequest, Sampling, SeedKey
from raylign.serve.bridge import Bridge

from .scripted import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def thread(engine: ScriptedEngine) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: engine)
    yield thread
    engine.steps.release(100)
    thread.close()


def _request(name: str, start: int, tokens: int, n: int = 1) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt=np.array([start], np.int32),
        sampling=Sampling(max_tokens=tokens),
        seed=SeedKey(0, 0, 0),
        n=n,
    )


async def _tokens(bridge: Bridge, *requests: GenerationRequest) -> dict[tuple[str, int], list[int]]:
    got: dict[tuple[str, int], list[int]] = {}
    async for events in bridge.stream(requests):
        for event in events:
            got.setdefault((event.request_id, event.index), []).append(event.token)
    return got


def test_each_reader_gets_its_own_rows_and_they_run_together(engine: ScriptedEngine, thread: EngineThread) -> None:
    async def main() -> list[dict[tuple[str, int], list[int]]]:
        bridge = Bridge(thread)
        engine.steps = threading.Semaphore(0)
        asks = [
            asyncio.ensure_future(_tokens(bridge, _request("a", 10, 3, n=2))),
            asyncio.ensure_future(_tokens(bridge, _request("b", 20, 2), _request("c", 30, 4))),
        ]
        await asyncio.sleep(0)  # both have submitted, in order, before the first step may end
        engine.steps.release(100)
        return list(await asyncio.gather(*asks))

    first, second = asyncio.run(main())
    assert first == {("a", 0): [10, 11, 12], ("a", 1): [10, 11, 12]}
    assert second == {("b", 0): [20, 21], ("c", 0): [30, 31, 32, 33]}
    assert engine.most_rows == 4


def test_a_refused_request_raises_and_its_companions_are_aborted(engine: ScriptedEngine, thread: EngineThread) -> None:
    async def main() -> None:
        bridge = Bridge(thread)
        with pytest.raises(InputError, match="too long"):
            await _tokens(bridge, _request("good", 1, 60), _request("bad", 1, 64))
        assert await _tokens(bridge, _request("next", 5, 2)) == {("next", 0): [5, 6]}

    asyncio.run(main())
    assert "good" in engine.aborted or engine.most_rows <= 1


def test_a_reader_that_leaves_aborts_its_request(engine: ScriptedEngine, thread: EngineThread) -> None:
    async def main() -> None:
        bridge = Bridge(thread)
        engine.steps = threading.Semaphore(1)
        stream = bridge.stream([_request("left", 1, 60)])
        first = await anext(stream)
        assert isinstance(first[0], TokenEvent)
        await stream.aclose()
        engine.steps.release(1)
        assert not await bridge.busy(10)

    asyncio.run(main())
    assert engine.aborted == ["left"]
    assert not engine.busy


def test_a_failed_step_reaches_every_reader(engine: ScriptedEngine, thread: EngineThread) -> None:
    def broken() -> list[TokenEvent]:
        raise ValueError("no memory")

    async def main() -> list[object]:
        bridge = Bridge(thread)
        asks = [_tokens(bridge, _request(name, 1, 3)) for name in ("a", "b")]
        return list(await asyncio.gather(*asks, return_exceptions=True))

    engine.step = broken  # type: ignore[method-assign]
    errors = asyncio.run(main())
    assert all(isinstance(error, RunFailed) and "no memory" in str(error) for error in errors)


def test_requests_that_fail_by_themselves_leave_the_others_running(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    step = engine.step

    def refuse_one() -> list[TokenEvent]:
        engine.step = step  # type: ignore[method-assign]
        raise RequestsFailed("bad diverged", frozenset({"bad"}))

    async def main() -> list[object]:
        bridge = Bridge(thread)
        engine.steps = threading.Semaphore(0)
        asks = [asyncio.ensure_future(_tokens(bridge, _request(name, 1, 9))) for name in ("good", "bad")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # both are queued before the first step may end
        engine.step = refuse_one  # type: ignore[method-assign]
        engine.steps.release(100)
        return list(await asyncio.gather(*asks, return_exceptions=True))

    good, bad = asyncio.run(main())
    assert good == {("good", 0): list(range(1, 10))}
    assert isinstance(bad, RequestsFailed)
    assert str(bad) == "bad diverged"


def test_a_reader_is_told_when_its_time_is_up_and_its_rows_are_aborted(
    engine: ScriptedEngine, thread: EngineThread
) -> None:
    async def main() -> None:
        bridge = Bridge(thread)
        engine.steps = threading.Semaphore(1)
        with pytest.raises(TimeoutError):
            async for _ in bridge.stream([_request("slow", 1, 60)], seconds=0.05):
                pass
        engine.steps.release(100)
        assert not await bridge.busy(10)

    asyncio.run(main())
    assert engine.aborted == ["slow"]
