"""vLLM's `AsyncLLM` on an event loop of its own thread, for a caller that has none."""

# pyright: reportMissingImports=false

import asyncio
import queue
import subprocess
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import wait
from typing import Any, TypeVar

from vllm.inputs import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from ...cluster.errors import RunFailed, WorkerLost
from . import reaper

T = TypeVar("T")

CALL_SECONDS = 600.0
"""How long vLLM may take to answer a command: loading the weights of a large model is the longest."""
LOOK_SECONDS = 1.0
"""How often a wait looks whether vLLM is alive."""


class Core:
    """Runs an `AsyncLLM`; rows stream into one queue. One thread calls it.

    Raises `WorkerLost` once vLLM's processes are gone, or where they do not answer.
    """

    def __init__(self, args: Any) -> None:
        self._arrivals: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _stop_loop, self._loop, thread)
        self.llm: Any = None
        watch = reaper.start()
        try:
            self.llm = self.ask(_start(args))
        except Exception as error:
            self._end()
            reaper.dismiss(watch)
            raise RunFailed(f"vLLM does not start on {args.model}: {error} (its own log has the cause)") from error
        reaper.arm(watch)
        self._end.detach()
        self._end = weakref.finalize(self, _shut_down, self.llm, self._loop, thread, watch)

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for what it returns; raises what it raises."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        give_up = time.monotonic() + CALL_SECONDS
        while not wait([future], timeout=LOOK_SECONDS).done:
            if self._is_dead():
                future.cancel()
                raise gone()
            if time.monotonic() > give_up:
                future.cancel()
                raise WorkerLost(f"vLLM did not answer within {CALL_SECONDS:.0f} s")
        try:
            return future.result()
        except EngineDeadError:
            raise gone() from None

    def _is_dead(self) -> bool:
        """vLLM tells only those requests of its end that it had then, and no command."""
        return self.llm is not None and self.llm.errored

    def begin(self, row: str, prompt: list[int], params: Any, adapter: Any) -> None:
        """Start generating; what becomes of the row arrives under its name."""
        self._loop.call_soon_threadsafe(self._spawn, row, prompt, params, adapter)

    def arrivals(self, seconds: float) -> list[tuple[str, Any]]:
        """What has arrived: a row's name with vLLM's output or the error that ended it. Waits so long for the first."""
        try:
            found = [self._arrivals.get(timeout=seconds)]
        except queue.Empty:
            if self._is_dead():
                raise gone() from None
            return []
        while not self._arrivals.empty():
            found.append(self._arrivals.get())
        return found

    def abort(self, rows: Sequence[str]) -> None:
        """End rows; when it returns, vLLM takes every later command as one that comes after them."""
        self.ask(self._abort(list(rows)))

    def close(self) -> None:
        """End vLLM's processes."""
        self._end()

    def _spawn(self, row: str, prompt: list[int], params: Any, adapter: Any) -> None:
        task = self._loop.create_task(self._stream(row, prompt, params, adapter))
        self._tasks[row] = task
        task.add_done_callback(lambda _: self._tasks.pop(row, None))

    async def _stream(self, row: str, prompt: list[int], params: Any, adapter: Any) -> None:
        try:
            async for output in self.llm.generate(tokens_input(prompt), params, row, lora_request=adapter):
                self._arrivals.put((row, output))
        except Exception as error:  # noqa: BLE001  whatever ends a row, its caller must hear of it
            self._arrivals.put((row, error))

    async def _abort(self, rows: list[str]) -> None:
        # Cancelling keeps a row that is not with vLLM yet from getting there; one that is, vLLM itself must end.
        tasks = [task for row in rows if (task := self._tasks.get(row))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.llm.abort(rows)


def gone() -> WorkerLost:
    """The error of an engine whose processes have ended."""
    return WorkerLost("vLLM's engine process is gone: its own log, above, has the reason")


async def _start(args: Any) -> AsyncLLM:
    return AsyncLLM.from_engine_args(args)


def _shut_down(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread, watch: subprocess.Popen[str]
) -> None:
    llm.shutdown(timeout=5.0)
    reaper.dismiss(watch)
    llm.shutdown = _nothing  # its destructor calls it again, when the interpreter's end has taken what it needs
    _stop_loop(loop, thread)


def _nothing(timeout: float | None = None) -> None:
    """In place of a second shutdown."""


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop.stop()


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(_end_tasks(loop), loop)
    if thread is not threading.current_thread():
        thread.join(timeout=5.0)
