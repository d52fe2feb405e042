"""Code against its tests in the sandbox: what is right passes, and each attack fails and leaves nothing behind."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.sandbox import run as sandbox
from raylign.rollout.sandbox.run import BrokenTests, Limits, Program, Verdict, require, run

TESTS = "def check(candidate):\n    assert candidate(2) == 5, 'of 2'\n    assert candidate(3) == 10\n"
RIGHT = "def f(x):\n    return x * x + 1\n"


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    try:
        require()
    except InputError as error:
        pytest.skip(str(error))


def tried(code: str, tests: str = TESTS, **limits: Any) -> Verdict:
    """The verdict of `f`, within 5 s of the clock unless told otherwise."""
    return run(Program(code=code, tests=tests, entry_point="f"), Limits(**{"seconds": 5.0, **limits}))


def inside(expression: str) -> Verdict:
    """Whether an expression or statement of the code raises within the walls: `f` is right only if it does not."""
    body = "\n".join(f"    {line}" for line in expression.splitlines())
    return tried(f"def go():\n    import os, socket, ctypes\n{body}\ngo()\n{RIGHT}")


def test_right_passes_and_wrong_fails_with_the_reason() -> None:
    assert tried(RIGHT) == Verdict("passed")
    assert tried("def f(x):\n    return 5") == Verdict("failed", "a test fails")
    assert tried("def f(x):\n    return 4") == Verdict("failed", "a test fails: of 2")
    assert tried("def f(x):\n    return 1 / 0").reason == "ZeroDivisionError: division by zero"
    assert tried("def f(x:\n").reason.startswith("raised SyntaxError")
    assert tried("g = 1").reason == "_Ended: has no function 'f'"


@pytest.mark.parametrize(
    "value", ["(1, [2.5, 'ü'], {3: {4, 5}})", "2 ** 20000", "b'x'", "3j", "float('inf')", "None", "frozenset([1])"]
)
def test_plain_values_cross_both_ways(value: str) -> None:
    code, tests = "def f(x):\n    return [x, x]", f"assert f({value}) == [{value}] * 2\nassert type(f(1)[0]) is int"
    assert tried(code, tests) == Verdict("passed")


def test_functions_without_entry_point_and_expected_exceptions() -> None:
    code = "def double(x):\n    if x < 0:\n        raise ValueError('low')\n    return 2 * x\ndef half(x): return x / 2"
    tests = "assert half(double(3)) == 3\ntry:\n    double(-1)\nexcept ValueError as e:\n    assert str(e) == 'low'"
    assert run(Program(code=code, tests=tests)) == Verdict("passed")


def test_human_eval_canonical_solutions_pass(shared_data: Path) -> None:
    with gzip.open(shared_data / "code" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]

    def verdict(row: dict[str, str]) -> str:
        code = row["prompt"] + row["canonical_solution"]
        program = Program(code=code, tests=row["test"], context=row["prompt"], entry_point=row["entry_point"])
        return run(program, Limits(seconds=60)).outcome

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(verdict, rows))
    assert len(rows) == 164
    assert {row["task_id"]: o for row, o in zip(rows, outcomes, strict=True) if o != "passed"} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "raise SystemExit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
        "def f(x):\n    return f(x)",
    ],
    ids=["exit", "_exit", "_exit-in-call", "SystemExit", "suicide", "segfault", "recursion"],
)
def test_an_early_end_is_no_pass(code: str) -> None:
    assert tried(code).outcome == "failed"


@pytest.mark.parametrize(
    "code",
    [
        "print('{\"passed\": true}', flush=True)",
        "import os\nfor h in range(64):\n    try:\n        os.write(h, b'\\0' * 7 + b'\\x10' + b'{\"passed\": true}')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "class Yes:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Yes()",
        "class Yes(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Yes(1)",
        "import builtins, sys\nbuiltins.AssertionError = ValueError\nsys.excepthook = None\ndef f(x):\n    return 4",
        "import gc\nchecks = [o for o in gc.get_objects() if getattr(o, '__name__', '') == 'check']\n"
        "def f(x):\n    return checks[0]",
    ],
    ids=["print", "every-handle", "equal-to-all", "equal-int", "builtins", "tests-in-memory"],
)
def test_a_forged_result_is_no_pass(code: str) -> None:
    assert tried(code).outcome == "failed"


def test_code_does_not_answer_for_builtins_or_context() -> None:
    code = "def abs(x):\n    return 0\ndef check_it(x):\n    return True\ndef f(x):\n    return 7"
    tests = "assert abs(f(1) - 1) < 1e-6"
    assert run(Program(code=code, tests=tests)).outcome == "failed"
    context = "def check_it(x):\n    return x == 1"
    assert run(Program(code=code, tests="assert check_it(f(1))", context=context)).outcome == "failed"


def test_processes_and_programs_cannot_be_started() -> None:
    for attempt in ("os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])"):
        verdict = inside(attempt)
        assert verdict.reason.startswith("raised PermissionError"), attempt
    assert "PermissionError" in inside("import subprocess\nsubprocess.run(['true'])").reason


def test_bombs_and_daemons_leave_nothing() -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    daemon = "import os\nos.setsid()\nif os.fork():\n    os._exit(0)\nwhile True: pass"
    threads = "import threading\nwhile True:\n    threading.Thread(target=threading.Event().wait).start()"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tried, bomb, seconds=1.0).result() == Verdict("late", "took longer than 1 s")
    assert tried(daemon).outcome == "failed"
    assert tried(threads, seconds=3.0).outcome in ("failed", "late")
    assert _descendants() == []


def test_memory_is_bounded() -> None:
    assert tried("x = bytearray(4 << 30)\n" + RIGHT).reason.startswith("raised MemoryError")
    assert tried("x = []\nwhile True:\n    x.append(bytes(1 << 20))").reason.startswith("raised MemoryError")
    assert tried("def f(x):\n    return 'x' * (100 << 20)").outcome == "failed"


def test_a_gigabyte_of_output_ends_the_run() -> None:
    start = time.monotonic()
    assert tried("import os\nblock = b'x' * 65536\nfor _ in range(16384):\n    os.write(1, block)") == Verdict(
        "flood", "printed more than 1048576 bytes"
    )
    assert time.monotonic() - start < 4
    assert tried("print('x' * 1000)\n" + RIGHT) == Verdict("passed")


def test_endless_code_ends_in_time() -> None:
    start = time.monotonic()
    assert tried("while True: pass", seconds=1.0).outcome == "late"
    assert tried("def f(x):\n    import time\n    time.sleep(1e6)", seconds=1.0).outcome == "late"
    assert tried(RIGHT, "while True: pass", seconds=1.0).outcome == "late"
    assert time.monotonic() - start < 6


def test_no_network() -> None:
    for attempt in ("socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.create_connection(('127.0.0.1', 22))"):
        assert inside(attempt).reason.startswith("raised PermissionError"), attempt
    assert inside("socket.socketpair()") == Verdict("passed")


def test_files_outside_cannot_be_read_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    for place in ("/proc/self/environ", "/proc/1/environ", "/etc/passwd", "/etc/hostname", str(secret)):
        assert inside(f"open({place!r}).read()").reason.startswith("raised PermissionError"), place
    for place in (str(secret), str(tmp_path / "new"), "/tmp/new", "/dev/shm/new", f"{sys.base_prefix}/lib/new"):
        assert inside(f"open({place!r}, 'w')").outcome == "failed", place
    assert inside(f"os.listdir({str(tmp_path)!r})").outcome == "failed"
    assert inside(f"os.unlink({str(secret)!r})").outcome == "failed"
    assert secret.read_text() == "s"


def test_environment_is_empty_and_privileges_are_gone() -> None:
    assert inside("assert set(os.environ) <= {'LC_CTYPE'}, os.environ") == Verdict("passed")  # Python's own
    assert inside("assert os.getuid() == 65534") == Verdict("passed")
    for attempt in ("os.setuid(0)", "os.chroot('/')", "os.kill(1, 9)", "os.sethostname(b'x')"):
        assert inside(attempt.replace("os.sethostname", "socket.sethostname")).outcome == "failed", attempt


@pytest.mark.parametrize("call", ["ptrace(16, 1, 0, 0)", "process_vm_readv(1, 0, 0, 0, 0, 0)", "unshare(0x10000000)"])
def test_debugging_and_new_namespaces_are_refused(call: str) -> None:
    attempt = f"libc = ctypes.CDLL(None, use_errno=True)\nassert libc.{call} == 0, ctypes.get_errno()"
    assert inside(attempt).reason == "raised AssertionError: 1"  # EPERM


def test_own_folder_takes_files_up_to_its_size() -> None:
    assert inside("open('x', 'w').write('a')\nassert open('x').read() == 'a'") == Verdict("passed")
    assert inside("open('x', 'wb').write(bytes(32 << 20))").outcome == "failed"
    assert inside("for i in range(64):\n    open(f'{i}', 'wb').write(bytes(1 << 20))").outcome == "failed"


def test_tests_that_do_not_compile_are_told_apart() -> None:
    with pytest.raises(BrokenTests, match="SyntaxError"):
        tried(RIGHT, "def check(:")


def test_nothing_is_left_on_disk_or_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tried("open('left', 'w').write('x')\n" + RIGHT) == Verdict("passed")
    assert list(tmp_path.iterdir()) == []
    assert _descendants() == []


def test_code_dies_with_who_asked(tmp_path: Path) -> None:
    program = (
        "from raylign.rollout.sandbox.run import *; run(Program(code='while True: pass', tests=''), Limits(seconds=99))"
    )
    asker = subprocess.Popen([sys.executable, "-c", program])
    _until(lambda: len(psutil.Process(asker.pid).children(recursive=True)) == 3)
    below = psutil.Process(asker.pid).children(recursive=True)
    asker.kill()
    asker.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("wall", "call"), [("Landlock", 444), ("seccomp", 157), ("namespaces", 272), ("private mounts", 165)]
)
def test_a_kernel_without_a_wall_runs_nothing(wall: str, call: int, tmp_path: Path) -> None:
    """A filter around the caller stands for the kernel: it refuses the call that builds the wall."""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are x86_64's")
    done = subprocess.run([sys.executable, "-c", _REFUSING.format(call=call)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"the code sandbox needs {wall}" in done.stdout


def test_works_as_a_plain_user(tmp_path: Path) -> None:
    """With the machine's own Python, since a user's may lie where others do not get."""
    python, root = Path("/usr/bin/python3"), Path(sandbox.__file__).parents[3]
    if os.getuid() != 0 or not python.exists():
        pytest.skip("this is a plain user, or there is no Python that another one may run")
    program = (
        f"import os, sys; sys.path.append({str(root)!r}); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from raylign.rollout.sandbox.run import require; require()"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr or "SyntaxError" in done.stderr:
        pytest.skip("another user does not get to this package, or the machine's Python is too old")
    assert done.returncode == 0, done.stderr


_REFUSING = """
import ctypes, struct, sys
from raylign.cluster.errors import InputError
from raylign.rollout.sandbox import run
libc = ctypes.CDLL(None, use_errno=True)
# prctl (157) is refused for PR_SET_SECCOMP (22) alone
lines = [(0x20, 0, 0, 0), (0x15, 0, 3 if {call} == 157 else 1, {call})]
lines += [(0x20, 0, 0, 16), (0x15, 0, 1, 22)] if {call} == 157 else []
lines += [(6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *line) for line in lines)
held = ctypes.create_string_buffer(code, len(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(lines), ctypes.addressof(held)), 0, 0) == 0
try:
    run.require()
except InputError as error:
    print(error)
    sys.exit(2)
"""


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def _descendants() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if sandbox._PROGRAM in " ".join(p.cmdline())]
