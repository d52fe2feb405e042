"""Weights as content: digests, adapter folders, and the versions a run publishes.

A digest names what the bytes are; a version says when a run made them. Both travel with every sample and every answer.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, RunFailed

Tensors = dict[str, np.ndarray]

_CONFIG_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


def tensors_digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order; 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def adapter_digest(tensors: Tensors, config: dict[str, Any], base: str) -> str:
    """What identifies an adapter: its tensors, the PEFT settings that change its output, its base's digest."""
    shape = {key: sorted(v) if isinstance(v := config.get(key), list | set | tuple) else v for key in _CONFIG_KEYS}
    text = json.dumps([tensors_digest(tensors), shape, base], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def base_digest(folder: Path) -> str:
    """SHA-256 over a model folder's weights, config and tokenizer files.

    Raises `InputError` where the folder has no safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} has no *.safetensors: save the model with save_pretrained")
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for path in [*weights, *(folder / n for n in names if (folder / n).exists())]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """A published version: `ref` points at the tensors in the object store, `config` is the adapter's PEFT config."""

    version: int
    digest: str
    ref: Any
    config: dict[str, Any]
    base: str


class WeightStore:
    """The versions a run has published; only the controller writes it.

    Versions grow by one, and one that follows a non-zero update must have a new digest: a policy whose update did not
    reach the publisher is caught here instead of training on stale samples.
    """

    def __init__(self) -> None:
        self._current: WeightVersion | None = None

    @property
    def current(self) -> WeightVersion:
        """The newest version. Raises `RunFailed` before the first."""
        if self._current is None:
            raise RunFailed("no weights have been published yet")
        return self._current

    def publish(self, weights: WeightVersion, *, changed: bool) -> WeightVersion:
        """Make a version the current one; `changed` says whether an update was not zero. Raises `RunFailed`."""
        before = self._current
        if before is not None:
            if weights.version <= before.version:
                raise RunFailed(f"weight version {weights.version} does not follow {before.version}")
            if changed and weights.digest == before.digest:
                raise RunFailed(
                    f"weight version {weights.version} has the digest of version {before.version} "
                    "after a non-zero update"
                )
        self._current = weights
        return weights
