"""Which adapters an engine holds: loaded on demand, kept while a request uses them, the longest unused leaves first."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from ..cluster.weights import Tensors
from ..rollout.engine_thread import EngineThread

Read = Callable[[], tuple[Tensors, dict[str, Any]]]
"""Gives an adapter's tensors and config; called away from the event loop and the engine's thread."""


class AdapterCache:
    """At most `most` adapters of an engine, by digest; all methods on one event loop."""

    def __init__(self, engine: EngineThread, most: int) -> None:
        self._engine = engine
        self._most = most
        self._users: Counter[str] = Counter()
        self._loads: OrderedDict[str, asyncio.Task[None]] = OrderedDict()
        """By digest, the longest unused first; an adapter whose task is done is in the engine."""
        self._freed = asyncio.Event()
        """Set, and replaced, whenever an adapter may have become idle."""

    def held(self) -> tuple[str, ...]:
        """Digests of the adapters that are loaded or being loaded."""
        return tuple(self._loads)

    def discard(self, digest: str) -> bool:
        """Drop an adapter that nothing uses; whether it is gone. One in use stays for a later call."""
        load = self._loads.get(digest)
        if load is None:
            return True
        if self._users[digest] or not load.done():
            return False
        self._drop([digest])
        self._wake()
        return True

    @asynccontextmanager
    async def use(self, digest: str, read: Read) -> AsyncIterator[None]:
        """Have an adapter in the engine for as long as the block lasts; requests for it share one load.

        Waits while all places are taken by adapters in use. Raises `InputError` for an adapter that the engine cannot
        hold, and whatever `read` raises.
        """
        self._users[digest] += 1  # before the first wait: what is in use is not evicted
        try:
            await self._load(digest, read)
            yield
        finally:
            self._users[digest] -= 1
            if digest in self._loads:
                self._loads.move_to_end(digest)
            self._wake()

    async def _load(self, digest: str, read: Read) -> None:
        while digest not in self._loads:
            if (victims := self._victims()) is None:
                await self._freed.wait()
                continue
            self._loads[digest] = asyncio.ensure_future(self._fetch(self._drop(victims), digest, read))
            self._loads[digest].add_done_callback(lambda _: self._wake())
        task = self._loads[digest]
        try:
            await asyncio.shield(task)
        except BaseException:
            failed = task.done() and (task.cancelled() or task.exception())
            if failed and self._loads.get(digest) is task:
                del self._loads[digest]
            raise

    def _wake(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    def _victims(self) -> list[str] | None:
        """Who has to leave for one more, the longest unused first; none where too many are in use."""
        over = max(len(self._loads) + 1 - self._most, 0)
        idle = [digest for digest, load in self._loads.items() if not self._users[digest] and load.done()]
        return idle[:over] if over <= len(idle) else None

    def _drop(self, victims: list[str]) -> Future[None]:
        for digest in victims:
            del self._loads[digest], self._users[digest]

        def drop(engine: Any) -> None:
            for digest in victims:
                engine.drop_adapter(digest)

        return self._engine.call(drop)

    async def _fetch(self, room: Future[None], digest: str, read: Read) -> None:
        tensors, config = await asyncio.to_thread(read)
        await asyncio.wrap_future(room)

        def load(engine: Any) -> None:
            if digest not in engine.adapters():
                engine.load_adapter(digest, tensors, config)

        await asyncio.wrap_future(self._engine.call(load))
