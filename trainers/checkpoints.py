"""Checkpoints: a folder a step, written beside its place, fsynced, renamed; valid only with its manifest of digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEEP_LAST = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint: where it is, the steps done when it was written, and the controller's state."""

    path: Path
    step: int
    state: dict[str, Any]


def write_checkpoint(root: Path, step: int, state: dict[str, Any], fill: Callable[[Path], None]) -> Checkpoint:
    """Write `root/step-000120` with what `fill` puts into the folder, `state.json` and a manifest of digests.

    `step` counts finished steps. A checkpoint of that step that is there already is replaced; older ones than the
    last two go.
    """
    final = root / f"step-{step:06d}"
    draft = root / f".{final.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    fill(draft)
    (draft / "state.json").write_text(json.dumps(state | {"step": step}))
    (draft / "manifest.json").write_text(json.dumps(_digests(draft), indent=1))
    for path in [*draft.iterdir(), draft]:
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(draft, final)
    _fsync(root)
    for old in sorted(root.glob("step-*"))[:-KEEP_LAST]:
        shutil.rmtree(old)
    return Checkpoint(final, step, state)


def latest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, if any, and the names of newer ones that were torn or changed."""
    broken = []
    for path in sorted(root.glob("step-*"), reverse=True):
        manifest = path / "manifest.json"
        try:
            valid = manifest.exists() and json.loads(manifest.read_text()) == _digests(path)
        except json.JSONDecodeError:
            valid = False
        if valid:
            state = json.loads((path / "state.json").read_text())
            return Checkpoint(path, state["step"], state), broken
        broken.append(path.name)
    return None, broken


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
