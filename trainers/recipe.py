"""From a YAML file to a `RunConfig`: every mistake is answered with file, line, value and the mend.

Imports neither ray nor torch.
"""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..cluster.config import NAME_PATTERN
from ..cluster.errors import InputError
from .config import RunConfig
from .data.files import HUB

PREPARED = "prepared://"

PATH_KEYS = ("path", "python")
"""Keys of a recipe whose values are paths."""

Place = tuple[str | int, ...]


def load_recipe(path: Path, overrides: Sequence[str] = (), *, planning: bool = False) -> RunConfig:
    """Read a recipe, apply `key.path=value` overrides, and make its paths absolute (`prepared://` ones stay).

    `planning` lets a model's dtype pass that its stages would not compute in. Raises `InputError` with the place of
    the first mistakes.
    """
    data, lines = _parse(path)
    sources: dict[Place, str] = {place: f"{path}:{line}" for place, line in lines.items()}
    for override in overrides:
        sources[_override(data, override)] = f"{path} with {override}"
    try:
        config = RunConfig.model_validate(data, context={"planning": planning})
    except ValidationError as error:
        first = error.errors()[:3]
        raise InputError("; ".join(_explain(e, data, sources, f"{path}:1") for e in first)) from None
    return _with_absolute_paths(config, path.resolve().parent, planning)


def dump_recipe(config: RunConfig) -> str:
    """The recipe as YAML, defaults that were not touched left out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


def _parse(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise InputError(f"no recipe at {path}" + (f": did you mean {near[0]}?" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        lines: dict[Place, int] = {}
        _note_lines(yaml.compose(text, Loader=yaml.SafeLoader), (), lines, path)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a recipe: it needs keys such as name, model and stages")
    return data, lines


def _note_lines(node: Any, place: Place, lines: dict[Place, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            if inner in lines:
                raise InputError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} stands twice: keep one")
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*place, i)] = value.start_mark.line + 1
            _note_lines(value, (*place, i), lines, path)


def _override(data: dict[str, Any], override: str) -> Place:
    """Apply one override; gives the place it was for."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r} needs the form key.path=value, such as stages.0.learning_rate=1e-5")
    parts = [int(p) if p.isdigit() else p for p in key.split(".")]
    at: Any = data
    try:
        for part in parts[:-1]:
            at = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
        at[parts[-1]] = yaml.safe_load(text)
    except (IndexError, TypeError, AttributeError):
        raise InputError(f"--set {override!r}: the recipe has nothing at {key}") from None
    except yaml.YAMLError:
        raise InputError(f"--set {override!r}: {text!r} is not a YAML value") from None
    return tuple(parts)


def _explain(error: Any, data: Any, sources: dict[Place, str], start: str) -> str:
    """One mistake in one line; `sources` says where each place was written, `start` where the recipe begins."""
    place = _place_in_data(error["loc"], data)
    context = error.get("ctx", {})
    if error["type"] == "unknown_key":
        place = (*place, context["key"])
    source = next((sources[place[:n]] for n in range(len(place), 0, -1) if place[:n] in sources), start)
    where = ".".join(map(str, place)) or "the recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = f"{error['loc'][-1]!r} is missing: add it"
    elif error["type"].startswith("union_tag"):
        message = _explain_tag(context)
    elif error["type"] not in ("unknown_key", "value_error"):
        message = f"{message}, not {_short(error['input'])}"
    if context.get("pattern") == NAME_PATTERN:
        message += ": a name has letters, digits, '.', '_' and '-', and begins with one of the first two"
    return f"{source}: {where}: {message}"


def _explain_tag(context: dict[str, Any]) -> str:
    known = [t.strip("' ") for t in context.get("expected_tags", "").split(",") if t]
    if "tag" not in context:
        return "'type' is missing: add it"
    near = get_close_matches(context["tag"], known, n=1)
    return f"unknown type {context['tag']!r}: " + (
        f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
    )


def _place_in_data(loc: tuple[Any, ...], data: Any) -> Place:
    """Pydantic's place without the union tags it inserts."""
    place: list[str | int] = []
    for part in loc:
        known = range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()
        if part in known:
            data = data[part]
            place.append(part)
    return tuple(place)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _with_absolute_paths(config: RunConfig, root: Path, planning: bool) -> RunConfig:
    """Paths relative to the recipe made absolute, so that a run can be resumed from anywhere."""
    data = config.model_dump(exclude_unset=True)
    data["model"]["path"] = _model_path(config.model.path, root)
    if config.prepare:
        data["prepare"]["path"] = _code_path(config.prepare.path, root)
    sections = [*data["stages"], *([data["evaluation"]] if config.evaluation else [])]
    for section in sections:
        for given in (section["data"], section.get("held_out") or {}):
            for source in (given, *given.get("mixture", ())):
                if source:
                    source["path"] = _absolute(source["path"], root)
        if section.get("teacher"):
            section["teacher"]["path"] = _absolute(section["teacher"]["path"], root)
        if (section.get("adapter") or {}).get("path"):
            section["adapter"]["path"] = _absolute(section["adapter"]["path"], root)
        if python := section.get("rollout", {}).get("python"):
            section["rollout"]["python"] = _executable(python, root)
        if environment := section.get("rollout", {}).get("environment"):
            _environment_paths(environment, root)
        if (section.get("critic") or {}).get("path"):
            section["critic"]["path"] = _absolute(section["critic"]["path"], root)
        for reward in section.get("rewards", ()):
            if reward["type"] == "function":
                reward["path"] = _code_path(reward["path"], root)
            if reward["type"] == "model" and reward.get("path"):
                reward["path"] = _absolute(reward["path"], root)
    return RunConfig.model_validate(data, context={"planning": planning})


def _absolute(path: str, root: Path) -> str:
    return path if path.startswith((PREPARED, HUB)) else str((root / Path(path).expanduser()).resolve())


def _executable(path: str, root: Path) -> str:
    """Links are not followed: the Python of an environment is one, to a Python without the environment."""
    return os.path.abspath(root / Path(path).expanduser())


def _model_path(path: str, root: Path) -> str:
    """A folder, or a hub id (`org/name`) where no such folder is and the text does not look like a path."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or (root / path).exists()
    return _absolute(path, root) if looks_local else path


def _environment_paths(environment: dict[str, Any], root: Path) -> None:
    if "path" in environment:
        environment["path"] = _code_path(environment["path"], root)
    if "functions" in environment:
        environment["functions"] = [_code_path(path, root) for path in environment["functions"]]


def _code_path(path: str, root: Path) -> str:
    """`file.py:function` made absolute; `package.module:function` left alone."""
    file, colon, function = path.rpartition(":")
    return f"{_absolute(file, root)}:{function}" if colon and file.endswith(".py") else path


def resolve_prepared(path: str, run: Path) -> Path:
    """Where a data or model path lies: `prepared://x` is `<run>/prepared/x`."""
    return run / "prepared" / path.removeprefix(PREPARED) if path.startswith(PREPARED) else Path(path)
