"""Adapters as PEFT folders: written whole under their digest, read as safetensors only."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .digests import adapter_digest
from .pieces import Tensors


def save_adapter(root: Path, tensors: Tensors, config: dict[str, Any], provenance: dict[str, Any]) -> tuple[str, Path]:
    """Write an ordinary PEFT folder as `root/<digest>`, all or nothing; the same adapter is written once.

    `provenance` needs `base_digest`. Returns the digest and the folder.
    """
    from safetensors.numpy import save_file

    digest = adapter_digest(tensors, config, provenance["base_digest"])
    folder = root / digest
    if folder.exists():
        return digest, folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root, prefix=".draft-"))
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, draft / "adapter_model.safetensors")
        (draft / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (draft / "provenance.json").write_text(json.dumps(provenance | {"digest": digest}, indent=1))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            raise
    return digest, folder


def load_adapter(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a PEFT folder: tensors and config. Only safetensors; raises `InputError` for anything else."""
    from safetensors.numpy import load_file

    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise InputError(f"{folder} has no adapter_model.safetensors (other formats can run code and are not read)")
    return load_file(path), json.loads((folder / "adapter_config.json").read_text())
