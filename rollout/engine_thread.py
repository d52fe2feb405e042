"""A thread that owns an engine: the only one that touches it, while any number of callers submit and listen."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from ..cluster.errors import RaylignError, RunFailed
from .engine import Engine, RequestsFailed, TokenEvent, completion_of
from .records import Completion, GenerationRequest

T = TypeVar("T")

Listener = Callable[[TokenEvent | RaylignError], None]
"""Called on the engine's thread with every token of a request, or with the error that ended it."""


class EngineThread:
    """Runs one engine's steps as long as there is work, and commands between two steps.

    `build` makes the engine on the thread itself, so that thread-bound settings (torch's thread count) hold.
    Raises what `build` raises.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._unfinished: dict[str, int] = {}
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, started), name="engine", daemon=True)
        self._thread.start()
        started.result()

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Queue a request; everything that becomes of it goes to the listener."""

        def command(engine: Engine) -> None:
            try:
                engine.submit(request)
            except RaylignError as error:
                listener(error)
                return
            except Exception as error:  # noqa: BLE001  whatever it is, its caller waits for an answer
                listener(RunFailed(f"the engine failed on a request: {type(error).__name__}: {error}"))
                return
            self._listeners[request.request_id] = listener
            self._unfinished[request.request_id] = request.n

        self._commands.put(command)

    def abort(self, request_id: str) -> None:
        """Forget a request; its listener hears no more of it."""

        def command(engine: Engine) -> None:
            if self._listeners.pop(request_id, None):
                del self._unfinished[request_id]
                engine.abort(request_id)

        self._commands.put(command)

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Run a function on the engine between two steps."""
        future: Future[T] = Future()

        def command(engine: Engine) -> None:
            try:
                future.set_result(function(engine))
            except Exception as error:  # noqa: BLE001  it is the caller's to handle, the engine goes on
                future.set_exception(error)

        self._commands.put(command)
        return future

    def close(self) -> None:
        """End the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _run(self, build: Callable[[], Engine], started: "Future[None]") -> None:
        try:
            engine = build()
        except BaseException as error:  # noqa: BLE001  raised again by the constructor
            started.set_exception(error)
            return
        started.set_result(None)
        while self._obey(engine):
            if engine.busy:
                self._step(engine)

    def _obey(self, engine: Engine) -> bool:
        """Carry out waiting commands; blocks for one while the engine is idle. False when it is time to end."""
        while not engine.busy or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        return True

    def _step(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except RequestsFailed as error:
            self._fail(engine, error.request_ids, error)
            return
        except Exception as error:  # noqa: BLE001  whatever broke the step ends the requests in it, not the thread
            self._fail(engine, list(self._listeners), RunFailed(f"the engine failed: {type(error).__name__}: {error}"))
            return
        for event in events:
            listener = self._listeners[event.request_id]
            if event.finish_reason:
                self._finish_one(event.request_id)
            listener(event)

    def _finish_one(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id], self._listeners[request_id]

    def _fail(self, engine: Engine, request_ids: Iterable[str], error: RaylignError) -> None:
        for request_id in request_ids:
            listener = self._listeners.pop(request_id)
            del self._unfinished[request_id]
            engine.abort(request_id)
            listener(error)


def collect(thread: EngineThread, requests: Sequence[GenerationRequest]) -> "Future[list[Completion]]":
    """Submit requests and gather their completions, in the order of requests and samples, into a future."""
    future: Future[list[Completion]] = Future()
    events: dict[tuple[str, int], list[TokenEvent]] = {(r.request_id, i): [] for r in requests for i in range(r.n)}
    running = set(events)

    def listen(event: TokenEvent | RaylignError) -> None:
        if isinstance(event, RaylignError):
            if not future.done():  # none of the other requests failed
                future.set_exception(event)
            return
        row = event.request_id, event.index
        events[row].append(event)
        if event.finish_reason:
            running.discard(row)
            if not running and not future.done():
                future.set_result([completion_of(row) for row in events.values()])

    for request in requests:
        thread.submit(request, listen)
    return future
