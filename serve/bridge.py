"""From an engine's thread to asyncio: many handlers of one event loop generate on one engine, together.

Tokens of a step reach the event loop in one hop, whatever the number of requests.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from ..cluster.errors import RaylignError
from ..rollout.engine import TokenEvent
from ..rollout.engine_thread import EngineThread
from ..rollout.records import GenerationRequest

_Item = TokenEvent | RaylignError | TimeoutError
_Mailbox = asyncio.Queue[_Item]


class Bridge:
    """The asyncio side of an `EngineThread`; all its methods are called on one event loop."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._outbox: deque[tuple[_Mailbox, _Item]] = deque()
        self._flush_is_due = False

    async def stream(
        self, requests: Sequence[GenerationRequest], seconds: float | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Generate; yields the new tokens of all these requests until the last row has finished.

        Leaving early (the client went away) aborts what still runs. Raises what the engine answers: `InputError` for a
        request it refuses, `RunFailed` where it failed; and `TimeoutError` after so many seconds.
        """
        mailbox: _Mailbox = asyncio.Queue()
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(seconds, mailbox.put_nowait, TimeoutError()) if seconds is not None else None
        rows = sum(request.n for request in requests)
        for request in requests:
            self._engine.submit(request, lambda item: self._post(loop, mailbox, item))
        try:
            while rows:
                events = await _take(mailbox)
                rows -= sum(event.finish_reason is not None for event in events)
                yield events
        finally:
            if alarm:
                alarm.cancel()
            for request in requests if rows else ():
                self._engine.abort(request.request_id)

    async def busy(self, timeout: float) -> bool:
        """Whether the engine has work; raises `TimeoutError` when its thread does not answer in `timeout` seconds."""
        return await asyncio.wait_for(asyncio.wrap_future(self._engine.call(lambda engine: engine.busy)), timeout)

    def _post(self, loop: asyncio.AbstractEventLoop, mailbox: _Mailbox, item: _Item) -> None:
        """Called on the engine's thread. What is posted before a flush begins is part of it."""
        self._outbox.append((mailbox, item))
        if not self._flush_is_due:
            self._flush_is_due = True
            loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        while self._outbox:
            mailbox, item = self._outbox.popleft()
            mailbox.put_nowait(item)


async def _take(mailbox: _Mailbox) -> list[TokenEvent]:
    """Everything that has arrived, at least one event."""
    items = [await mailbox.get()]
    while not mailbox.empty():
        items.append(mailbox.get_nowait())
    events = [item for item in items if isinstance(item, TokenEvent)]
    for item in items if len(events) < len(items) else ():
        if not isinstance(item, TokenEvent):
            raise item
    return events
