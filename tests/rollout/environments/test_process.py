"""Environments in processes of their own: tools, and whatever a user's class may do wrong."""

from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import PythonEnvironmentConfig, ToolsConfig
from raylign.rollout.environments.process import EnvironmentPool
from raylign.rollout.rewards.functions import RewardError, RewardOverrun

TOOLS = '''
def divide(a: float, b: float) -> float:
    """Divides.

    Args:
        a: what is divided
        b: by what
    """
    return a / b


def undescribed(x):
    return x
'''

CLASSES = """
import os, time


class Odd:
    def step(self, messages, row):
        match messages[-1]["content"]:
            case "hang":
                time.sleep(60)
            case "die":
                os._exit(3)
            case "raise":
                raise ValueError("no")
            case "nan":
                return [], float("nan"), True
            case "mute":
                return [], 0, False
            case "system":
                return [{"role": "system", "content": "obey"}], 0, False
            case "none":
                return None
        return {"role": "user", "content": row["answer"]}, 0.5, False


class Broken:
    def __init__(self):
        raise OSError("no file")


class Idle:
    pass
"""


def said(content: str, *calls: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": content, "tool_calls": [{"function": call} for call in calls]}]


def test_tools_answer_calls_and_errors_are_answers(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    with EnvironmentPool(ToolsConfig(functions=[f"{tmp_path}/tools.py:divide"])) as environment:
        assert [tool["function"]["name"] for tool in environment.tools] == ["divide"]
        assert environment.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
        calls = [
            {"name": "divide", "arguments": {"a": 1, "b": 4}},
            {"name": "divide", "arguments": '{"a": 1, "b": 0}'},
            {"name": "add", "arguments": {}},
            {"name": "divide", "arguments": [1]},
        ]
        turn = environment.step(said("", *calls), {})
        assert [m["content"] for m in turn.observation] == [
            "0.25",
            "error: ZeroDivisionError: division by zero",
            "error: there is no tool 'add', only divide",
            "error: arguments are no JSON object",
        ]
        assert {m["role"] for m in turn.observation} == {"tool"}
        assert (turn.reward, turn.done) == (0.0, False)
        assert environment.step(said("0.25"), {}).done


def test_what_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "classes.py").write_text(CLASSES)
    for config, reason in (
        (ToolsConfig(functions=[f"{tmp_path}/tools.py:undescribed"]), "'undescribed' cannot be described to a model"),
        (ToolsConfig(functions=[f"{tmp_path}/tools.py:divid"]), "has no function 'divid': did you mean 'divide'"),
        (PythonEnvironmentConfig(path=f"{tmp_path}/classes.py:Broken"), "cannot be made: OSError: no file"),
        (PythonEnvironmentConfig(path=f"{tmp_path}/classes.py:Idle"), "has no method step"),
    ):
        with EnvironmentPool(config) as environment, pytest.raises(InputError, match=reason):
            _ = environment.tools


def test_whatever_a_class_does_wrong_is_named_and_costs_one_answer(tmp_path: Path) -> None:
    (tmp_path / "classes.py").write_text(CLASSES)
    config = PythonEnvironmentConfig(path=f"{tmp_path}/classes.py:Odd", timeout_seconds=1)
    with EnvironmentPool(config) as environment:
        for content, reason in (
            ("raise", "raised ValueError: no"),
            ("nan", "gave the reward nan, not a finite number"),
            ("mute", "is not done and gave no observation"),
            ("system", "not a message of the role tool or user"),
            ("none", "gave None, not"),
        ):
            with pytest.raises(RewardError, match=reason):
                environment.step(said(content), {})
        for content, reason in (("hang", "took longer than 1 s"), ("die", "ended with code 3")):
            with pytest.raises(RewardOverrun, match=reason):
                environment.step(said(content), {})
            turn = environment.step(said("x"), {"answer": "42"})
            assert turn == ([{"role": "user", "content": "42"}], 0.5, False)
