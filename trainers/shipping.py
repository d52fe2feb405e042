"""What a recipe needs besides its own folder, when the run happens elsewhere. Imports neither ray nor torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .config import RunConfig


def outside_paths(config: RunConfig, folder: Path) -> dict[str, str]:
    """The paths of a recipe that leave its folder, by their key: `{"model.path": "/models/base"}`.

    `config` is what `load_recipe` gives, with absolute paths; `folder` is the recipe's.
    """
    leaves = _leaves(config.model_dump(mode="json", exclude_unset=True), "")
    root = folder.resolve()
    return {key: text for key, text in leaves if Path(text).is_absolute() and root not in Path(text).parents}


def paths_as_written(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The paths of a recipe file as its author wrote them, by their key; overrides win."""
    written = dict(_leaves(yaml.safe_load(recipe.read_text()), ""))
    given = dict(override.split("=", 1) for override in overrides)
    return written | {key: str(yaml.safe_load(text)) for key, text in given.items() if key.split(".")[-1] == "path"}


def as_overrides(paths: dict[str, str]) -> list[str]:
    """Those paths as `--set` values."""
    return [f"{key}={json.dumps(path)}" for key, path in paths.items()]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string under a key `path`, with its dotted key."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in parts:
        place = f"{key}.{name}" if key else str(name)
        if name == "path" and isinstance(inner, str):
            yield place, inner
        else:
            yield from _leaves(inner, place)
