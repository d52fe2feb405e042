"""What an adapter folder must prove before its weights are used: format, content and base."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.errors import InputError
from ..cluster.weights import Tensors, adapter_digest, load_adapter

_CODE_FORMATS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LARGEST_RANK = 4096
_LARGEST_JSON = 4 << 20
"""Bytes of a config; those of real adapters have a few thousand."""


def recorded_base(folder: Path) -> str | None:
    """The base digest an adapter folder says it was made for; none where it says nothing."""
    path = folder / "provenance.json"
    if not path.exists():
        return None
    record = _read_object(path)
    return str(record["base_digest"]) if "base_digest" in record else None


def read_adapter(folder: Path, digest: str, base: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and PEFT config of an adapter folder whose content is `digest` on `base`.

    Raises `InputError` for files that can run code, links, unreadable or non-finite weights, and any other content.
    """
    _check_files(folder)
    config = _read_object(folder / "adapter_config.json")
    _check_ranks(folder, config)
    tensors = _read_tensors(folder)
    for name, array in tensors.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise InputError(f"adapter {folder}: {name} has values that are not finite")
    found = adapter_digest(tensors, config, base)
    if found != digest:
        raise InputError(
            f"adapter {folder} is not what its name says: its content on base {base[:12]} has digest {found[:12]}, "
            f"not {digest[:12]}; it was changed, or made for another base"
        )
    return tensors, config


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"adapter folder {folder} does not exist")
    for path in folder.iterdir():
        if path.is_symlink():
            raise InputError(f"adapter {folder}: {path.name} is a link; copy the file into the folder")
        if path.suffix in _CODE_FORMATS:
            raise InputError(f"adapter {folder}: {path.name} can run code and is not read; save it as safetensors")


def _check_ranks(folder: Path, config: dict[str, Any]) -> None:
    """Before any weight is read: a file of a rank that no adapter has would take memory first."""
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    said = [config.get("r"), *(ranks if isinstance(ranks := config.get("rank_pattern"), dict) else {}).values()]
    for rank in said:
        if isinstance(rank, int) and rank > _LARGEST_RANK:
            raise InputError(f"adapter {folder} has rank {rank}: at most {_LARGEST_RANK} is served")
    if not path.is_file():
        return  # `load_adapter` says what is missing
    try:
        with safe_open(path, "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise InputError(f"{path} is broken: {error}") from None
    for name, shape in shapes.items():
        if ".lora_A." in name and shape and shape[0] > _LARGEST_RANK:
            raise InputError(f"adapter {folder}: {name} has rank {shape[0]}: at most {_LARGEST_RANK} is served")


def _read_object(path: Path) -> dict[str, Any]:
    if path.is_file() and path.stat().st_size > _LARGEST_JSON:
        raise InputError(f"{path} has {path.stat().st_size} bytes: at most {_LARGEST_JSON} are read")
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: save the adapter with save_pretrained") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_tensors(folder: Path) -> Tensors:
    from safetensors import SafetensorError

    try:
        tensors, _ = load_adapter(folder)
    except SafetensorError as error:
        raise InputError(f"{folder / 'adapter_model.safetensors'} is broken: {error}") from None
    if not tensors:
        raise InputError(f"{folder / 'adapter_model.safetensors'} holds no tensors")
    return tensors
