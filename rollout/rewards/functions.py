"""Rewards: what a recipe names becomes a function of a completion and its row.

A reward built here runs in the caller's process and takes as long as it takes; `reward_process` is what bounds it.
Imports neither ray nor torch.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ...cluster.errors import InputError, RaylignError
from ..config import (
    ExactReward,
    FormatReward,
    FunctionReward,
    JsonSchemaReward,
    MathReward,
    ModelReward,
    RewardConfig,
    TextReward,
)

Row = dict[str, Any]
ScoreFunction = Callable[[str, Row], object]


class RewardError(RaylignError, ValueError):
    """A reward raised, or gave something that is no finite number."""


class RewardOverrun(RewardError):
    """A reward did not end in time, or took its process down."""


@dataclass(frozen=True, slots=True)
class LocalReward:
    """A reward that runs in this process, without a time-out."""

    name: str
    weight: float
    function: ScoreFunction

    def score(self, completion: str, row: Row) -> float:
        """The unweighted score. Raises `RewardError` with the cause and, where there is one, the line."""
        try:
            value = self.function(completion, row)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"raised {one_line(error)}{_where(error)}") from error
        return finite(value)


def build_reward(config: TextReward, root: Path) -> LocalReward:
    """What a recipe's entry for a reward of text means; paths are relative to `root`, the recipe's folder.

    Raises `InputError` for a path that does not import, a missing function, a wrong signature or a broken pattern.
    """
    return LocalReward(reward_name(config), config.weight, _function(config, root))


ENVIRONMENT = "environment"
"""The name of what an environment gives, among the parts of a reward."""


def reward_name(config: RewardConfig) -> str:
    """The name in metrics: the entry's own, else its function's or its stage's, else its type."""
    if config.name:
        return config.name
    if isinstance(config, ModelReward):
        return config.stage or config.type
    return config.path.rpartition(":")[2] if isinstance(config, FunctionReward) else config.type


def check_names(rewards: Iterable[RewardConfig]) -> None:
    """Refuse two rewards of one name: their metrics would overwrite each other."""
    names = [reward_name(r) for r in rewards]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two rewards are called {name!r}: give one of them a name of its own")


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of unweighted parts, both by reward name, in the order of the parts."""
    return sum(weights[name] * value for name, value in parts.items())


def finite(value: object) -> float:
    """The number a reward gave, from Python, numpy or a one-element tensor. Raises `RewardError` for anything else."""
    number = _plain(value)
    if not isinstance(number, int | float):
        raise RewardError(f"gave {value!r:.80} ({type(value).__name__}), not a number")
    if not math.isfinite(number):
        raise RewardError(f"gave {number}, which is not finite")
    return float(number)


def load_function(path: str, root: Path) -> ScoreFunction:
    """The function at `file.py:function` (relative to `root`) or `package.module:function`.

    Raises `InputError` with the cause, and the nearest name where the function is missing.
    """
    function = load_named(path, root, "reward")
    _check_signature(function, path)
    return function


def load_named(path: str, root: Path, what: str) -> Callable[..., Any]:
    """What a recipe names by `file.py:name` or `package.module:name` and calls; `what` it is to be, for messages.

    Raises `InputError` as `load_function` does.
    """
    place, colon, name = path.rpartition(":")
    if not (place and colon and name):
        raise InputError(f"{what} path {path!r} names no function: write file.py:function or package.module:function")
    module = _import_file(root / place, path, what) if place.endswith(".py") else _import_module(place, path, what)
    named = getattr(module, name, None)
    if not callable(named):
        raise InputError(f"{what} path {path!r}: {place} has no function {name!r}{_nearest(module, name)}")
    return named


def one_line(error: BaseException) -> str:
    """An error's type and message in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def _function(config: TextReward, root: Path) -> ScoreFunction:
    if isinstance(config, FunctionReward):
        return load_function(config.path, root)
    if isinstance(config, FormatReward):
        return _format_function(config.pattern)
    if isinstance(config, ExactReward):
        return partial(_exact, config)
    if isinstance(config, JsonSchemaReward):
        from .json_schema import schema_function

        return schema_function(config.json_schema)
    from .math_answers import math_function

    return math_function(config)


def _format_function(text: str) -> ScoreFunction:
    try:
        pattern = re.compile(text, re.DOTALL)
    except re.error as error:
        raise InputError(f"format reward: pattern {text!r} is no regular expression: {error}") from error
    return lambda completion, row: 1.0 if pattern.fullmatch(completion) else 0.0


def _exact(config: ExactReward, completion: str, row: Row) -> float:
    gold, mark = gold_answer(config, row), config.completion_after
    said = completion if mark is None else completion.rpartition(mark)[2]
    return 1.0 if (mark is None or mark in completion) and said.strip() == gold else 0.0


def gold_answer(config: MathReward | ExactReward, row: Row) -> str:
    """The row's gold answer: its column, after the last mark where one is named. Raises `RewardError`."""
    if config.answer not in row:
        raise RewardError(f"found no column {config.answer!r} in the row, which has {', '.join(row) or 'none'}")
    text = str(row[config.answer])
    if config.answer_after is None:
        return text.strip()
    _, mark, answer = text.rpartition(config.answer_after)
    if not mark:
        raise RewardError(f"found no {config.answer_after!r} in column {config.answer!r}: {text!r:.80}")
    return answer.strip()


def _import_file(file: Path, path: str, what: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"{what} path {path!r}: there is no file {file}")
    # What lies beside the file can be imported by it; last, so that it shadows nothing.
    folder = str(file.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"{what}_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{what} path {path!r} does not import: {one_line(error)}{_where(error)}") from error
    return module


def _import_module(place: str, path: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} path {path!r} does not import: {one_line(error)}{_where(error)}") from error


def _nearest(module: ModuleType, name: str) -> str:
    known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": it has {', '.join(sorted(known))}" if known else ": it has none"


def _check_signature(function: Callable[..., object], path: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward path {path!r} is an async function: make it a plain one, `def`")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins have none
        return
    try:
        signature.bind("", {})
    except TypeError as error:
        raise InputError(f"reward path {path!r} takes {signature}: it is called as f(completion, row)") from error


def _plain(value: object) -> object:
    """What a numpy or torch scalar holds; anything else as it is."""
    item = getattr(value, "item", None)
    try:
        return item() if callable(item) else value
    except (ValueError, RuntimeError, TypeError):  # several elements, or none
        return value


def _where(error: BaseException) -> str:
    """` (file.py:12)`, the innermost line of the traceback outside this module and the import system."""
    place, trace = "", error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<"):
            place = f" ({Path(file).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
