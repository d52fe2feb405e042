"""A reward in a process of its own, so that one that hangs or crashes costs its time-out and nothing else.

Only a process can be bounded: a thread in an endless loop, in one long operation on big integers or in a regular
expression that backtracks cannot be stopped. The child is a fresh interpreter (no fork of a process full of threads)
and talks over a socket pair. It ends when the socket closes; inside a call a kernel timer ends it, even when the
parent is gone and no Python code can run.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError, RunFailed
from ..config import MathReward, TextReward
from ..records import Group
from .functions import RewardError, RewardOverrun, Row, build_reward, reward_name

START_SECONDS = 120.0
"""How long a reward's imports may take."""
GRACE_SECONDS = 5.0
"""How much longer than its time-out a child may live in one call, before the kernel ends it."""
_AHEAD = 1 << 15
"""Bytes of questions that a child may have before it has answered the first."""
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve(int(sys.argv[2]))"


class BoundedReward:
    """A reward entry of a recipe, run in a child process within `timeout_seconds` a completion.

    Calls from several threads are served one after the other. A child that had to be ended is replaced at the next
    call; the time that takes does not count as the completion's. `overruns` counts them.

    A math expression that cannot be evaluated in time is not shown to be equal: it scores 0 and is no error. Models do
    write `10^{10^{10}}`, and a run must not end with it. For any other reward an overrun is an error.
    """

    def __init__(self, config: TextReward, root: Path) -> None:
        self.config = config
        self.name = reward_name(config)
        self.weight = config.weight
        self.overruns = 0
        self._root = root
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._ready = False

    def __enter__(self) -> "BoundedReward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child without waiting for it; `score` and `wait_ready` do."""
        with self._lock:
            self._launch()

    def wait_ready(self) -> None:
        """Wait until the reward is loaded. Raises `InputError` for an entry that does not load."""
        with self._lock:
            self._loaded()

    def score(self, completion: str, row: Row) -> float:
        """The unweighted score. Raises `RewardError`, and `RewardOverrun` for a time-out or a dead process."""
        (outcome,) = self._outcomes([completion], row)
        if isinstance(outcome, RewardError):
            raise outcome
        return outcome

    def outcomes(self, group: Group) -> Iterator[float | RewardError]:
        """The score of each sample of a group, or what was wrong with it."""
        yield from self._outcomes([sample.text for sample in group.samples], group.row)

    def _outcomes(self, completions: Sequence[str], row: Row) -> list[float | RewardError]:
        """Of each completion, in order; the child has the next before it has answered one, so nobody waits for it."""
        questions, told = [pickle.dumps((completion, row)) for completion in completions], []
        with self._lock:
            while len(told) < len(questions):
                try:
                    for answer in self._loaded().answers(questions[len(told) :], self.config.timeout_seconds):
                        told.append(RewardError(answer["error"]) if "error" in answer else float(answer["score"]))
                except RewardOverrun as error:
                    self._drop()
                    self.overruns += 1
                    told.append(0.0 if isinstance(self.config, MathReward) else error)
        return told

    def counters(self) -> dict[str, float]:
        """None besides `overruns`."""
        return {}

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._drop()

    @property
    def pid(self) -> int | None:
        """The child's process id, or none before the first call and after `close`."""
        return self._child.process.pid if self._child else None

    def _launch(self) -> "Child":
        if self._child is None:
            self._child, self._ready = Child((self.config, self._root)), False
        return self._child

    def _loaded(self) -> "Child":
        child = self._launch()
        if not self._ready:
            answer = self._first_answer(child)
            if "input" in answer:
                self._drop()
                raise InputError(answer["input"])
            self._ready = True
        return child

    def _first_answer(self, child: "Child") -> dict[str, Any]:
        try:
            return child.answer(START_SECONDS)
        except RewardOverrun as error:
            self._drop()
            raise RunFailed(f"reward {self.name!r} could not be loaded: it {error}") from error

    def _drop(self) -> None:
        if self._child:
            self._child.end()
        self._child = None


class Child:
    """One child process, whose life is `serve` of a module, and the socket to it; `first` is what it is sent first."""

    def __init__(self, first: object, module: str = __name__) -> None:
        from multiprocessing import Pipe

        self.connection, theirs = Pipe()
        boot = _BOOT.format(module=module)
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot, json.dumps(sys.path), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints is no part of a command's answer
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.connection.send_bytes(pickle.dumps(first))

    def answers(self, questions: Sequence[bytes], timeout: float) -> Iterator[dict[str, Any]]:
        """The answer to each question, `timeout` seconds after the one before at the latest.

        Questions go ahead as far as they fit into the socket, where writing waits for nobody. Raises `RewardOverrun`
        for the first that has no answer.
        """
        sent, ahead = 0, 0
        for i, question in enumerate(questions):
            while sent < len(questions) and (sent == i or ahead + len(questions[sent]) <= _AHEAD):
                ahead += len(questions[sent])
                sent += 1
                with suppress(BrokenPipeError, ConnectionResetError):  # `answer` says of which question it died
                    self.connection.send_bytes(questions[sent - 1])
            yield self.answer(timeout)
            ahead -= len(question)

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next answer. Raises `RewardOverrun` where there is none in time."""
        try:
            if not self.connection.poll(timeout):
                raise RewardOverrun(f"took longer than {timeout:g} s")
            return json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._died() from None

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _died(self) -> RewardOverrun:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RewardOverrun(f"lost its process, which {how}")


def serve(handle: int) -> None:
    """The child's life: load the reward, then answer until the parent closes the socket `handle`."""
    live(handle, _serve)


def live(handle: int, life: Callable[[Connection], None]) -> None:
    """A child's life on the socket `handle`, until the parent closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        life(Connection(handle))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        # The parent is gone or has closed. Threads that the user's code started must not keep this process.
        sys.stdout.flush()
        os._exit(0)


def _serve(connection: Connection) -> None:
    config, root = pickle.loads(connection.recv_bytes())
    if isinstance(config, MathReward):
        from .math_answers import limit_memory

        limit_memory()
    try:
        reward = build_reward(config, root)
    except InputError as error:
        connection.send_bytes(json.dumps({"input": str(error)}).encode())
        return
    _warm(config)
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        completion, row = pickle.loads(connection.recv_bytes())
        die_after(config.timeout_seconds + GRACE_SECONDS)
        try:
            answer: dict[str, Any] = {"score": reward.score(completion, row)}
        except RewardError as error:
            answer = {"error": str(error)}
        die_after(0)
        connection.send_bytes(json.dumps(answer).encode())


def _warm(config: TextReward) -> None:
    """Pay for heavy imports before the first completion's clock starts."""
    if isinstance(config, MathReward):
        build_reward(config, Path()).score("\\boxed{\\frac{1}{2}}", {config.answer: f"{config.answer_after or ''}0.5"})


def die_after(seconds: float) -> None:
    """Have the kernel end this process then (0: never); no Python code has to run for it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
