"""Whatever ends an answer, nothing goes on behind it."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from raylign.serve.sending import ClientGone, EventStream, while_connected
from starlette.requests import Request

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"spec_version": "2.4"}}


class Source:
    """Numbers without an end; `closed` once nobody can draw more."""

    def __init__(self) -> None:
        self.closed = False

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            self.closed = True


async def _texts(numbers: AsyncGenerator[int, None]) -> AsyncGenerator[str, None]:
    async for number in numbers:
        yield str(number)


async def _never() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("sent", [0, 1, 4])
def test_a_stream_closes_its_source_however_early_its_client_leaves(sent: int) -> None:
    async def main() -> None:
        source, left = Source(), sent
        numbers = source.numbers()
        await anext(numbers)  # as the first step is drawn before the status is sent

        async def send(message: Any) -> None:
            nonlocal left
            if not left:
                raise OSError("the client went away")
            left -= 1

        stream = EventStream(_texts(numbers), numbers, 10, {})
        with pytest.raises(Exception):  # noqa: B017, PT011  which one is the server's to know
            await stream(SCOPE, _never, send)
        assert source.closed

    asyncio.run(main())


def test_a_client_that_does_not_read_is_let_go() -> None:
    async def main() -> None:
        source = Source()
        numbers = source.numbers()
        await anext(numbers)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await _never()

        await EventStream(_texts(numbers), numbers, 0.05, {})(SCOPE, _never, send)
        assert source.closed

    asyncio.run(main())


@pytest.mark.parametrize("leaves", [True, False])
def test_work_ends_with_its_client(leaves: bool) -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def work() -> str:
            try:
                await (_never() if leaves else asyncio.sleep(0))
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return "done"

        async def receive() -> Any:
            if not leaves:
                await _never()
            return {"type": "http.disconnect"}

        request = Request(SCOPE, receive)
        if leaves:
            with pytest.raises(ClientGone):
                await while_connected(request, work())
            assert cancelled.is_set()
        else:
            assert await while_connected(request, work()) == "done"

    asyncio.run(main())
