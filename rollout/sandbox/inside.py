"""What runs inside: one process holds the code under test, another its tests. Standard library only; a program.

    outside ── stdin: the code, then its tests ──► tests (pid 1 of its namespace) ◄── pipes, plain values ──► code
            ◄── stdout: the verdict ───────────────┘                                     │
            ◄── stderr: what the code prints ────────────────────────────────────────────┘

The code under test has neither the tests nor the way on which the verdict goes out: it was forked before the tests were
read. So it can print what it likes, and end as it likes.
"""

import builtins
import collections
import functools
import itertools
import json
import math
import os
import random
import re
import string
import sys
import typing
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import plain
import walls

_PRELOADED = (collections, functools, itertools, json, math, random, re, string, typing)
"""What much code imports: loaded once, before the clock of the code starts."""


def main() -> int:
    """Build the walls, then run; 3 where a wall is missing, and then nothing was run."""
    walls.die_with_parent()
    try:
        request = plain.receive(0)
        walls.own_namespaces()
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        walls.die_with_parent()
        walls.own_folder(request["folder"], request["disk"])
        _both(request)
    except walls.Missing as error:
        plain.send(1, {"missing": str(error)})
    except EOFError:
        pass
    return 3


def _both(request: dict[str, Any]) -> None:
    """Fork into code and tests; never returns."""
    (ask_out, ask_in), (answer_out, answer_in) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        walls.die_with_parent()
        _keep(0, os.open("/dev/null", os.O_RDONLY))
        _keep(1, 2)
        for handle in (ask_in, answer_out):
            os.close(handle)
        _enclose(request, ready=answer_in)
        _code(request["code"], ask_out, answer_in)
    for handle in (ask_out, answer_in):
        os.close(handle)
    _keep(2, os.open("/dev/null", os.O_WRONLY))
    _enclose(request, ready=None)
    plain.send(1, _verdict(ask_in, answer_out))
    os._exit(0)


def _keep(handle: int, source: int) -> None:
    os.dup2(source, handle)


def _enclose(request: dict[str, Any], ready: int | None) -> None:
    """All walls that a process builds around itself. The code's process says so before it runs a line of it."""
    try:
        walls.limits(request["seconds"], request["memory"], request["disk"])
        walls.no_privileges()
        walls.only_files(request["readable"], request["folder"])
        walls.only_calls()
    except walls.Missing as error:
        plain.send(1 if ready is None else ready, {"missing": str(error)})
        os._exit(3)
    if ready is not None:
        plain.send(ready, {"enclosed": True})


def _code(source: str, questions: int, answers: int) -> None:
    """The life of the code under test: run it, then answer calls of its functions. Never returns."""
    names: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(source, "solution.py", "exec"), names)
        callables = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
        plain.send(answers, {"names": callables})
    except BaseException as error:  # noqa: BLE001  whatever the code raises, SystemExit too, is its failure
        plain.send(answers, {"raised": _named(error)})
        os._exit(1)
    while True:
        question = plain.receive(questions)
        try:
            value = names[question["name"]](*plain.decode(question["args"]), **plain.decode(question["kwargs"]))
            answer = {"value": plain.encode(value)}
        except Exception as error:  # noqa: BLE001  the tests may expect it
            answer = {"raised": _named(error)}
        plain.send(answers, answer)


def _named(error: BaseException) -> list[str]:
    return [type(error).__name__, " ".join(str(error).split())[:200]]


class _Ended(BaseException):
    """The code ended, or broke the protocol, before the tests were done."""


class _Code:
    """The code under test, seen from the tests."""

    def __init__(self, questions: int, answers: int) -> None:
        self._questions, self._answers = questions, answers

    def hear(self) -> dict[str, Any]:
        try:
            answer = plain.receive(self._answers)
        except (EOFError, OSError):
            raise _Ended("ended before its tests did") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise _Ended(f"sent {error}") from None
        if not isinstance(answer, dict):
            raise _Ended("sent what is no answer")
        return answer

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call one of its functions; an exception comes back as the built-in one of its name."""
        try:
            plain.send(self._questions, {"name": name, "args": plain.encode(args), "kwargs": plain.encode(kwargs)})
        except OSError:
            raise _Ended("ended before its tests did") from None
        answer = self.hear()
        try:
            if "raised" in answer:
                raised = _exception(*answer["raised"])
            else:
                return plain.decode(answer["value"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _Ended(f"sent what is no answer ({error})") from None
        raise raised


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(text)
    return Exception(f"{name}: {text}")


def _verdict(questions: int, answers: int) -> dict[str, Any]:
    """Read the tests, run them, and say how it went: `passed`, `failed` (why), `broken` (the tests are), `missing`."""
    code = _Code(questions, answers)
    try:
        first = code.hear()
        if "missing" in first:
            return first
        given = plain.receive(0)
        tests = compile(given["tests"], "tests.py", "exec")
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(given["context"], "context.py", "exec"), names)
    except _Ended as error:
        return {"failed": str(error)}
    except (SyntaxError, ValueError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    try:
        told = code.hear()
        if "raised" in told:
            return {"failed": "raised {}: {}".format(*told["raised"])}
        _give(names, told["names"], given["entry_point"], code)
        exec(tests, names)
        if given["entry_point"] and callable(names.get("check")):
            names["check"](names[given["entry_point"]])
    except AssertionError as error:
        return {"failed": f"a test fails: {error}".rstrip(": ")[:300]}
    except BaseException as error:  # noqa: BLE001  all that ends the tests early is a failure
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {"passed": True}


def _give(names: dict[str, Any], functions: list[str], entry_point: str, code: _Code) -> None:
    """The entry point; without one all functions of the code, but none in the place of a built-in or of the context's,
    which would let the code answer for them."""
    if entry_point and entry_point not in functions:
        raise _Ended(f"has no function {entry_point!r}")
    own = [name for name in map(str, functions) if name not in names and not hasattr(builtins, name)]
    for name in [entry_point] if entry_point else own:
        names[name] = functools.partial(code.call, name)


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())
