"""What a recipe needs besides its own folder, when the run happens elsewhere. Imports neither ray nor torch."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..cluster.rundir import RESERVED, RunDir, write_atomically
from .config import RunConfig
from .recipe import PATH_KEYS, dump_recipe, load_recipe


def outside_paths(config: RunConfig, folder: Path) -> dict[str, str]:
    """The paths of a recipe that leave its folder, by their key: `{"model.path": "/models/base"}`.

    `config` is what `load_recipe` gives, with absolute paths; `folder` is the recipe's.
    """
    leaves = _leaves(config.model_dump(mode="json", exclude_unset=True), "")
    root = folder.resolve()
    return {key: text for key, text in leaves if Path(text).is_absolute() and root not in Path(text).parents}


def paths_inside(config: RunConfig, folder: Path) -> list[str]:
    """The files and folders in its folder that a recipe names; of `file.py:function` the file."""
    leaves = _leaves(config.model_dump(mode="json", exclude_unset=True), "")
    files = [text.rpartition(":")[0] if ".py:" in text else text for _, text in leaves]
    return [file for file in files if Path(file).is_absolute() and folder.resolve() in Path(file).parents]


def paths_as_written(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The paths of a recipe file as its author wrote them, by their key; overrides win."""
    written = dict(_leaves(yaml.safe_load(recipe.read_text()), ""))
    given = dict(override.split("=", 1) for override in overrides)
    return written | {key: str(yaml.safe_load(text)) for key, text in given.items() if key.split(".")[-1] in PATH_KEYS}


def as_overrides(paths: dict[str, str]) -> list[str]:
    """Those paths as `--set` values."""
    return [f"{key}={json.dumps(path)}" for key, path in paths.items()]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string under a key of `PATH_KEYS`, with its dotted key."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in parts:
        place = f"{key}.{name}" if key else str(name)
        if name in PATH_KEYS and isinstance(inner, str):
            yield place, inner
        else:
            yield from _leaves(inner, place)


def keep(recipe: Path, overrides: Sequence[str], run: RunDir) -> RunConfig:
    """Copy a recipe's folder to `<run>/source`, load the recipe from there, and work in the run's directory.

    A job's own copy is Ray's to delete, and lies on one node; the run's storage is shared and stays, for actors on
    other nodes and for a later resume.
    """
    draft, source = run / ".source", run / "source"
    try:
        with run.hold():
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(recipe.resolve().parent, draft, ignore=_without_runs(run.path.parent.resolve()))
            shutil.rmtree(source, ignore_errors=True)
            draft.rename(source)
            config = load_recipe(source / recipe.name, overrides).model_copy(update={"name": run.name})
            write_atomically(run / "recipe.yaml", dump_recipe(config))
    except BaseException:
        run.discard()
        raise
    os.chdir(run.path)
    return config


def _without_runs(storage: Path) -> Callable[[str, list[str]], set[str]]:
    """What `copytree` leaves out: the storage, or what runs put into it where it is the recipe's own folder."""

    def leave_out(folder: str, names: list[str]) -> set[str]:
        at = Path(folder).resolve()
        runs = {p.parent.name for p in storage.glob("*/recipe.yaml")} | {*RESERVED, ".submitted"}
        return {name for name in names if at / name == storage or (at == storage and name in runs)}

    return leave_out
