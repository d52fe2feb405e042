"""Rewards as functions, and in processes of their own."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import FormatReward, FunctionReward, MathReward
from raylign.rollout.records import Group, Sample
from raylign.rollout.rewards.functions import (
    RewardError,
    RewardOverrun,
    build_reward,
    check_names,
    finite,
    load_function,
    reward_name,
    total,
)
from raylign.rollout.rewards.process import BoundedReward

SOURCE = """
import os, time
from beside import SHARE
calls = 0
def exact(completion, row):
    return 1.0 if completion == row["answer"] else SHARE
def count(completion, row):
    global calls
    calls += 1
    return calls
def hang(completion, row):
    while completion == "hang":
        pass
    return 2
def crash(completion, row):
    os._exit(3)
def moody(completion, row):
    if completion == "crash":
        os._exit(3)
    return hang(completion, row) if completion else 1 / 0
def broken(completion, row):
    return 1 / len(completion)
def one(completion):
    return 1.0
async def later(completion, row):
    return 1.0
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text("SHARE = 0.25\n")
    (tmp_path / "bad.py").write_text("x = 1\nimport no_such_thing\n")
    return tmp_path


def function(name: str, **fields: float) -> FunctionReward:
    return FunctionReward.model_validate({"path": f"rewards.py:{name}", **fields})


def gone(pid: int) -> bool:
    """Whether the process is gone (or waits to be reaped) within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        threading.Event().wait(0.02)
    return False


def test_function_reward_scores_and_imports_what_lies_beside_it(root: Path) -> None:
    reward = build_reward(function("exact", weight=2.0), root)
    assert (reward.name, reward.weight) == ("exact", 2.0)
    assert reward.score("7", {"answer": "7"}) == 1.0
    assert reward.score("8", {"answer": "7"}) == 0.25


def test_function_by_import_path() -> None:
    assert load_function("operator:contains", Path())("abc", "b") is True  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rewards.py", "names no function"),
        ("absent.py:f", "there is no file"),
        ("rewards.py:exct", "did you mean 'exact'"),
        ("rewards.py:one", r"takes \(completion\): it is called as f\(completion, row\)"),
        ("rewards.py:later", "async function"),
        ("bad.py:f", r"ModuleNotFoundError: No module named 'no_such_thing' \(bad.py:2\)"),
        ("no_such_package.x:f", "No module named 'no_such_package'"),
        ("json:no_such", "json has no function 'no_such'"),
    ],
)
def test_path_that_does_not_load_is_an_input_error_in_one_line(root: Path, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_function(path, root)
    assert "\n" not in str(caught.value)


def test_format_reward_matches_the_whole_completion() -> None:
    reward = build_reward(FormatReward(pattern=r"<think>.*</think>\s*\d+"), Path())
    assert reward.name == "format"
    assert reward.score("<think>a\nb</think> 12", {}) == 1.0
    assert reward.score("<think>a</think> 12 more", {}) == 0.0
    with pytest.raises(InputError, match="no regular expression"):
        build_reward(FormatReward(pattern="("), Path())


def test_names_and_total() -> None:
    assert reward_name(function("exact")) == "exact"
    assert reward_name(MathReward(name="right")) == "right"
    assert total({"a": 1.0, "b": 0.5}, {"a": 2.0, "b": 0.1}) == pytest.approx(2.05)
    with pytest.raises(InputError, match="two rewards are called 'exact'"):
        check_names([function("exact"), function("exact")])


def test_finite_takes_numbers_and_refuses_the_rest() -> None:
    assert [finite(v) for v in (True, 3, np.float32(0.5), np.bool_(1), np.array([2.0]))] == [1.0, 3.0, 0.5, 1.0, 2.0]
    for value in (None, "1.0", float("nan"), float("inf"), np.array([1.0, 2.0]), np.array([]), [1.0]):
        with pytest.raises(RewardError, match="gave"):
            finite(value)


@pytest.mark.parametrize(
    ("gold", "completion", "score"),
    [
        ("Adds up.\n#### 1,000", "so \\boxed{1000}", 1.0),
        ("#### 72", "We get 70+2 = 72", 1.0),
        ("#### \\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("#### 72", "\\boxed{73}", 0.0),
        ("#### 72", "\\boxed{72} or \\boxed{73}", 0.0),
        ("#### 72", "", 0.0),
    ],
)
def test_math_reward_compares_values(gold: str, completion: str, score: float) -> None:
    reward = build_reward(MathReward(answer_after="####"), Path())
    assert reward.score(completion, {"answer": gold}) == score


def test_math_reward_works_off_the_main_thread() -> None:
    reward, scores = build_reward(MathReward(), Path()), []
    thread = threading.Thread(target=lambda: scores.append(reward.score("\\boxed{8}", {"answer": "8"})))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_row_without_a_gold_answer_is_an_error() -> None:
    reward = build_reward(MathReward(answer_after="####"), Path())
    for row, message in (
        ({"question": "?"}, "no column 'answer' in the row, which has question"),
        ({"answer": "72"}, "no '####' in column 'answer'"),
        ({"answer": "#### "}, "cannot read the gold answer"),
    ):
        with pytest.raises(RewardError, match=message):
            reward.score("\\boxed{72}", row)


def test_bounded_reward_ends_a_hanging_function_and_goes_on(root: Path) -> None:
    reward = BoundedReward(function("hang", timeout_seconds=0.3), root)
    reward.wait_ready()
    pid = reward.pid
    start = time.monotonic()
    with pytest.raises(RewardOverrun, match=r"took longer than 0\.3 s"):
        reward.score("hang", {})
    assert time.monotonic() - start < 5
    assert pid is not None
    assert gone(pid)
    assert reward.score("fine", {}) == 2.0
    reward.close()
    assert reward.pid is None


def test_bounded_reward_names_errors_and_dead_processes(root: Path) -> None:
    broken, crash, count = (BoundedReward(function(n), root) for n in ("broken", "crash", "count"))
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: division by zero \(rewards.py:22\)"):
        broken.score("", {})
    with pytest.raises(RewardOverrun, match="ended with code 3"):
        crash.score("", {})
    assert [count.score("", {}) for _ in range(3)] == [1, 2, 3]  # one process, its state kept
    for reward in (broken, crash, count):
        reward.close()


@pytest.mark.parametrize("length", [0, 20_000, 400_000])
def test_of_a_group_only_the_completion_that_ends_the_process_is_without_a_score(root: Path, length: int) -> None:
    """Whether the child has the next completions already or their texts are too long for the socket."""
    fine = "x" * length + "x"
    texts = (fine, "crash", fine, "hang", fine, "", fine, "crash")
    samples = tuple(
        Sample(tokens=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32), finish_reason="stop", text=text)
        for text in texts
    )
    with BoundedReward(function("moody", timeout_seconds=0.5), root) as reward:
        told = list(reward.outcomes(Group(step=0, index=0, prompt=np.zeros(1, np.int32), row={}, samples=samples)))
        assert reward.overruns == 3
        assert reward.score("fine", {}) == 2.0
    assert told[::2] == [2.0] * 4
    said = ("ended with code 3", "took longer than 0.5 s", "division by zero", "ended with code 3")
    for error, words in zip(told[1::2], said, strict=True):
        assert words in str(error)


def test_bounded_reward_that_does_not_load_is_an_input_error(root: Path) -> None:
    reward = BoundedReward(function("exct"), root)
    with pytest.raises(InputError, match="did you mean 'exact'"):
        reward.wait_ready()
    assert reward.pid is None


@pytest.mark.parametrize("expression", ["10^{10^{10}}", "999999999!"])
def test_math_expression_that_never_ends_is_ended(expression: str) -> None:
    reward = BoundedReward(MathReward(timeout_seconds=1.0), Path())
    reward.wait_ready()
    start = time.monotonic()
    assert reward.score(f"\\boxed{{{expression}}}", {"answer": "72"}) == 0.0
    assert time.monotonic() - start < 5
    assert reward.score("\\boxed{72}", {"answer": "72"}) == 1.0
    assert reward.overruns == 1
    reward.close()


PARENT = """
import os, pickle, sys
from pathlib import Path
from raylign.rollout.config import FormatReward
from raylign.rollout.rewards.process import BoundedReward
reward = BoundedReward(FormatReward(pattern="(a+)+b", timeout_seconds=0.2), Path())
reward.wait_ready()
reward._child.connection.send_bytes(pickle.dumps(("a" * 60, {})))
print(reward.pid, flush=True)
os._exit(0)
"""


def test_child_ends_after_its_parent_even_where_no_python_code_can_run() -> None:
    """The parent dies while its reward is lost in a regular expression: the kernel's timer ends the child."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.wait()
    assert gone(child)


def test_what_a_reward_prints_goes_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loud.py").write_text("def loud(completion, row):\n    print('scoring', flush=True)\n    return 1\n")
    with BoundedReward(FunctionReward(path="loud.py:loud"), tmp_path) as reward:
        assert reward.score("", {}) == 1.0
    assert capfd.readouterr() == ("", "scoring\n")
