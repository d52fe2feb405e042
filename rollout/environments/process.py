"""An environment in processes of its own, so that one that hangs or crashes costs its time-out and one episode."""

import json
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ...cluster.errors import InputError, RunFailed
from ..config import EnvironmentConfig, ToolsConfig
from ..rewards.functions import RewardError, RewardOverrun, load_named, one_line
from ..rewards.process import GRACE_SECONDS, START_SECONDS, Child, die_after, live
from .protocol import Environment, Message, Turn
from .tools import ToolEnvironment


class EnvironmentPool:
    """The processes of a recipe's environment; a step takes one that is free, and waits where none is.

    A process that had to be ended is replaced at its next step.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._free: SimpleQueue[_Seat] = SimpleQueue()
        self._seats = [_Seat(config) for _ in range(config.processes)]
        for seat in self._seats:
            seat.begin()
            self._free.put(seat)

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tools(self) -> Sequence[Message]:
        """The JSON schemas of what the policy may call. Raises `InputError` for an environment that does not load."""
        with self._seat() as seat:
            return seat.ready()

    def step(self, messages: Sequence[Message], row: dict[str, Any]) -> Turn:
        """Have it answer the last message. Raises `RewardError` with what was wrong: it raised, or gave nonsense, and
        `RewardOverrun` where it took too long or lost its process."""
        with self._seat() as seat:
            return seat.step(messages, row)

    def close(self) -> None:
        """End the processes."""
        for seat in self._seats:
            seat.end()

    @contextmanager
    def _seat(self) -> Iterator["_Seat"]:
        seat = self._free.get()
        try:
            yield seat
        finally:
            self._free.put(seat)


class _Seat:
    """One process, begun anew when it was lost."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._child: Child | None = None
        self._tools: Sequence[Message] | None = None

    def begin(self) -> Child:
        if self._child is None:
            self._child, self._tools = Child(self._config, __name__), None
        return self._child

    def ready(self) -> Sequence[Message]:
        child = self.begin()
        if self._tools is None:
            try:
                told = child.answer(START_SECONDS)
            except RewardOverrun as error:
                self.end()
                raise RunFailed(f"the environment could not be loaded: it {error}") from error
            if "input" in told:
                self.end()
                raise InputError(told["input"])
            self._tools = told["tools"]
        return self._tools or ()

    def step(self, messages: Sequence[Message], row: dict[str, Any]) -> Turn:
        self.ready()
        child = self.begin()
        try:
            (told,) = child.answers([pickle.dumps((list(messages), row))], self._config.timeout_seconds)
        except RewardOverrun:
            self.end()
            raise
        if "error" in told:
            raise RewardError(told["error"])
        return Turn(*told["turn"])

    def end(self) -> None:
        if self._child:
            self._child.end()
        self._child = None


def load_environment(config: EnvironmentConfig) -> Environment:
    """The environment of a recipe, in this process. Raises `InputError` for one that does not load."""
    if isinstance(config, ToolsConfig):
        return ToolEnvironment([load_named(path, Path("/"), "environment") for path in config.functions])
    made = load_named(config.path, Path("/"), "environment")
    try:
        environment = made()
    except Exception as error:
        raise InputError(f"environment path {config.path!r} cannot be made: {one_line(error)}") from error
    if not callable(getattr(environment, "step", None)):
        raise InputError(f"environment path {config.path!r} has no method step(messages, row)")
    return environment


def checked(given: object) -> Turn:
    """What a step gave, if it is a turn. Raises `RewardError` with what is wrong."""
    if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
        raise RewardError(f"gave {given!r:.80}, not (observation, reward, done)")
    observation, reward, done = Turn(*given)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise RewardError(f"gave the reward {reward!r:.80}, not a finite number")
    messages: list[Any] = list(observation) if isinstance(observation, list | tuple) else [observation]
    for message in messages:
        said = message if isinstance(message, dict) else {}
        if said.get("role") not in ("tool", "user") or not isinstance(said.get("content"), str):
            raise RewardError(f"gave the observation {message!r:.80}, not a message of the role tool or user")
    if not done and not messages:
        raise RewardError("is not done and gave no observation to go on from")
    return Turn(messages, float(reward), bool(done))


def serve(handle: int) -> None:
    """The child's life: load the environment, then answer until the parent closes the socket `handle`."""
    live(handle, _serve)


def _serve(connection: Connection) -> None:
    config = pickle.loads(connection.recv_bytes())
    try:
        environment = load_environment(config)
        told = json.dumps({"tools": list(getattr(environment, "tools", ()))})
    except InputError as error:
        connection.send_bytes(json.dumps({"input": str(error)}).encode())
        return
    connection.send_bytes(told.encode())
    while True:
        messages, row = pickle.loads(connection.recv_bytes())
        die_after(config.timeout_seconds + GRACE_SECONDS)
        try:
            answer: dict[str, Any] = {"turn": checked(environment.step(messages, row))}
        except RewardError as error:
            answer = {"error": str(error)}
        except Exception as error:  # noqa: BLE001  (the user's own code; named where it is counted)
            answer = {"error": f"raised {one_line(error)}"}
        die_after(0)
        connection.send_bytes(json.dumps(answer, default=str).encode())
