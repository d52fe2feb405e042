"""A version's tensors as a file of a checkpoint, from which it can be published again."""

import json
from pathlib import Path
from typing import Any

from ..errors import RunFailed
from .pieces import Piece, Tensors, tensors_of


def keep_version(folder: Path, version: int, pieces: list[Piece], config: dict[str, Any]) -> None:
    """Write `version-000007.safetensors`, with the adapter's config. Raises `RunFailed` where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = _path(folder, version)
    try:
        save_file(tensors_of(pieces), path, {"config": json.dumps(config)})
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"weight version {version} cannot be written to {path}: {error}") from error


def kept_version(folder: Path, version: int) -> tuple[Tensors, dict[str, Any]]:
    """What `keep_version` wrote: tensors and config."""
    from safetensors import safe_open

    with safe_open(_path(folder, version), "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def _path(folder: Path, version: int) -> Path:
    return folder / f"version-{version:06d}.safetensors"
