"""Run code against its tests in the sandbox, from outside: one call, one verdict, nothing left behind.

Three ways out of time: the kernel's CPU limit, the wall clock here, and the parent's death. The whole tree ends each
time, since its first process is the init of a process namespace.
"""

import json
import os
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...cluster.errors import InputError
from . import plain

Outcome = Literal["passed", "failed", "late", "flood"]
_PROGRAM = str(Path(__file__).with_name("inside.py"))
_VERDICT_BYTES = 1 << 16


class BrokenTests(ValueError):
    """The tests themselves do not compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one run. Seconds are wall and CPU; bytes are of address space of each of its two processes, of all files
    together, and of what it prints."""

    seconds: float = 10.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    output: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Code under test, the tests' source, what of the row the tests may use themselves, and the function they call."""

    code: str
    tests: str
    context: str = ""
    entry_point: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run went, and why in words; `late`: out of time, `flood`: it printed too much."""

    outcome: Outcome
    reason: str = ""


def run(program: Program, limits: Limits = Limits()) -> Verdict:
    """Run the tests. Raises `InputError` where the kernel lacks a wall (then nothing was run), `BrokenTests`, and
    `OSError` where no process can be had."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        with process:
            try:
                return _verdict(process, _messages(program, limits, folder), limits)
            finally:
                process.kill()  # and with it, by the kernel, all that it started


def require() -> None:
    """Prove that the sandbox works here. Raises `InputError` with what is missing."""
    verdict = run(Program(code="def one():\n    return 1\n", tests="assert one() == 1"), Limits(seconds=30))
    if verdict.outcome != "passed":
        raise InputError(f"the code sandbox does not work on this machine: {verdict.reason or verdict.outcome}")


def _messages(program: Program, limits: Limits, folder: str) -> bytes:
    paths = sysconfig.get_paths()
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    readable = [paths["stdlib"], paths["platstdlib"], f"{sys.base_prefix}/lib", *libraries]
    request: dict[str, Any] = {
        "code": program.code,
        "folder": folder,
        "readable": [*readable, "/dev/null", "/dev/urandom"],
        "seconds": limits.seconds,
        "memory": limits.memory,
        "disk": limits.disk,
    }
    tests = {"tests": program.tests, "context": program.context, "entry_point": program.entry_point}
    framed = [json.dumps(message).encode() for message in (request, tests)]
    return b"".join(len(data).to_bytes(8, "big") + data for data in framed)


def _verdict(process: "subprocess.Popen[bytes]", message: bytes, limits: Limits) -> Verdict:
    """Talk to the process until it has said its verdict or has broken a limit."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    held, printed, deadline = b"", 0, time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while process.stdout in {key.fileobj for key in selector.get_map().values()}:
            left = deadline - time.monotonic()
            if left <= 0:
                return Verdict("late", f"took longer than {limits.seconds:g} s")
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    message = _written(process.stdin.fileno(), message)
                    if not message:
                        selector.unregister(process.stdin)
                    continue
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    held = (held + data)[:_VERDICT_BYTES]
                else:
                    printed += len(data)
            if printed > limits.output:
                return Verdict("flood", f"printed more than {limits.output} bytes")
    return _read(held)


def _written(handle: int, message: bytes) -> bytes:
    """What is left of a message after as much as fits; nothing where nobody reads it."""
    try:
        return message[os.write(handle, message) :]
    except BrokenPipeError:
        return b""


def _read(held: bytes) -> Verdict:
    size = int.from_bytes(held[:8], "big")
    if len(held) < 8 or len(held) != 8 + size or size > plain.MAX_BYTES:
        return Verdict("failed", "its processes ended without a verdict")
    told = json.loads(held[8:])
    if "missing" in told:
        raise InputError(
            f"the code sandbox needs {told['missing']}: code rewards run nowhere without it; allow it on this machine "
            "or in this container, or take the reward out"
        )
    if "broken" in told:
        raise BrokenTests(told["broken"])
    return Verdict("passed") if "passed" in told else Verdict("failed", told["failed"])
