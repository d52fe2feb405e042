"""What a sweep tries: `--param stages.0.learning_rate=loguniform(1e-5, 1e-3)`. Imports neither ray nor torch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ...cluster.errors import InputError

_FORM = re.compile(r"^\s*([a-z]+)\s*\((.*)\)\s*$", re.DOTALL)
_KINDS = ("uniform", "loguniform", "randint", "choice", "grid")


@dataclass(frozen=True, slots=True)
class Param:
    """A key of the recipe and the values it may have: bounds (the upper one of `randint` is never drawn), or a list."""

    key: str
    kind: str
    values: tuple[Any, ...]

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that the recipe must take if it is to take all."""
        if self.kind == "randint":
            return (self.values[0], self.values[1] - 1)
        return self.values


def parse(texts: Sequence[str]) -> list[Param]:
    """Read `KEY=KIND(…)` texts. Raises `InputError` with what is wrong and the forms there are."""
    found = [_parse(text) for text in texts]
    twice = {p.key for p in found if sum(p.key == other.key for other in found) > 1}
    if twice:
        raise InputError(f"--param {sorted(twice)[0]} is given twice")
    if not found:
        raise InputError(
            "nothing to try: give --param, such as --param 'stages.0.learning_rate=loguniform(1e-5, 1e-3)'"
        )
    return found


def _parse(text: str) -> Param:
    key, sign, form = text.partition("=")
    matched = _FORM.match(form)
    if not sign or not key.strip() or not matched or matched[1] not in _KINDS:
        raise InputError(
            f"--param {text!r} needs the form KEY=KIND(…), KIND one of {', '.join(_KINDS)}: "
            "stages.0.learning_rate=loguniform(1e-5, 1e-3)"
        )
    kind = matched[1]
    try:
        values = tuple(_number(v) for v in yaml.safe_load(f"[{matched[2]}]"))
    except yaml.YAMLError:
        raise InputError(f"--param {text!r}: what is in the parentheses is no list of values") from None
    return Param(key.strip(), kind, _checked(text, kind, values))


def _number(value: Any) -> Any:
    """YAML takes `1e-5` for a text, since it has no dot."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _checked(text: str, kind: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if kind in ("choice", "grid"):
        if not values:
            raise InputError(f"--param {text!r} has no value to choose from")
        return values
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if len(values) != 2 or not numbers or values[0] >= values[1]:
        raise InputError(f"--param {text!r} needs two numbers, the smaller one first")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"--param {text!r}: a logarithm needs bounds above 0")
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        raise InputError(f"--param {text!r} needs whole numbers")
    return values


def require_valid(params: Sequence[Param], load: Callable[[list[str]], Any]) -> None:
    """Have the recipe refuse, by `load` with overrides, what some trial would be refused for later."""
    for param in params:
        for value in param.extremes:
            load([override(param.key, value)])


def override(key: str, value: Any) -> str:
    """A value as `--set` takes it."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"


def as_tune(params: Sequence[Param]) -> dict[str, Any]:
    """The same for Ray Tune."""
    from ray import tune

    made: dict[str, Any] = {}
    for param in params:
        match param.kind:
            case "choice":
                made[param.key] = tune.choice(list(param.values))
            case "grid":
                made[param.key] = tune.grid_search(list(param.values))
            case kind:
                made[param.key] = getattr(tune, kind)(*param.values)
    return made
