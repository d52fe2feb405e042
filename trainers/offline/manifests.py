"""Manifests of Ray Train's checkpoints: which files each rank wrote, with their digests.

Ray Train lays the ranks' files together and keeps the list of checkpoints; it does not look into them. A worker that
resumes does, and takes the newest one whose files are as they were written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def write_manifest(folder: Path, rank: int, ranks: int) -> None:
    """Write `manifest-<rank>.json` of all files that one of so many ranks has put into `folder`."""
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / f"manifest-{rank}.json").write_text(json.dumps({"ranks": ranks, "files": files}, indent=1))


def newest_valid(newest: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint `newest`, or the last valid one beside it that is older; and the names of those refused."""
    older = sorted((p for p in newest.parent.glob("step-*") if p.name < newest.name), reverse=True)
    refused: list[str] = []
    for folder in [newest, *older]:
        if _valid(folder):
            return folder, refused
        refused.append(folder.name)
    return None, refused


def step_of(checkpoint: Path) -> int:
    """Steps that were done when a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def free_name(root: Path, step: int) -> str:
    """A name for the checkpoint of a step: `step-000120`, or `step-000120-2` beside one that was refused.

    Ray Train keeps refused ones in its list and deletes them by their folder, so theirs cannot be used again.
    """
    name, number = f"step-{step:06d}", 1
    taken = name
    while (root / taken).exists():
        number += 1
        taken = f"{name}-{number}"
    return taken


def _valid(folder: Path) -> bool:
    """Whether all ranks' manifests are there and their files match."""
    first = _read(folder / "manifest-0.json")
    return first is not None and all(_matches(folder, rank) for rank in range(first["ranks"]))


def _matches(folder: Path, rank: int) -> bool:
    manifest = _read(folder / f"manifest-{rank}.json")
    if manifest is None:
        return False
    return all((folder / n).is_file() and _digest(folder / n) == digest for n, digest in manifest["files"].items())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
