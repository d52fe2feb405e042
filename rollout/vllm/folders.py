"""Weights as the folders that vLLM reads, checked before it sees them: what it met in the middle would end it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster.errors import InputError


class BaseShapes:
    """Names and shapes of a model folder's weights, and the writing of others in their place."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self._name = folder.name
        self._shapes = _read_shapes(folder)
        self._optional = {"lm_head.weight"} if tied else set[str]()

    def neutral_adapter(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and PEFT config of an adapter that changes nothing: zeros on a layer of the attention."""
        name = next(n for n, shape in self._shapes.items() if ".0." in n and "attn" in n and len(shape) == 2)
        outputs, inputs = self._shapes[name]
        layer = name.removesuffix(".weight")
        tensors = {
            f"base_model.model.{layer}.lora_A.weight": np.zeros((1, inputs), np.float32),
            f"base_model.model.{layer}.lora_B.weight": np.zeros((outputs, 1), np.float32),
        }
        return tensors, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [layer.rpartition(".")[2]]}

    def write(self, folder: Path, tensors: dict[str, np.ndarray]) -> None:
        """Write weights as safetensors. Raises `InputError` when a name or shape is unknown or a weight is missing."""
        from safetensors.numpy import save_file

        given = {name: array for name, array in tensors.items() if name in self._shapes or name not in self._optional}
        for name, array in given.items():
            if name not in self._shapes:
                raise InputError(f"the weights have {name}, which {self._name} does not")
            if array.shape != self._shapes[name]:
                raise InputError(f"{name} has the shape {array.shape}, the model's is {self._shapes[name]}")
        missing = sorted(self._shapes.keys() - given.keys())
        if missing:
            raise InputError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
        folder.mkdir()
        save_file({name: np.ascontiguousarray(a) for name, a in given.items()}, folder / "model.safetensors")


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], *, max_rank: int) -> None:
    """Write an adapter as a PEFT folder. Raises `InputError` for a rank above `max_rank`, another kind than LoRA, and
    numbers that are not finite."""
    from safetensors.numpy import save_file

    kind = config.get("peft_type")
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise InputError(f"the adapter's peft_type is {kind!r}: vLLM serves LORA")
    if not tensors:
        raise InputError("the adapter has no tensors")
    ranks = [array.shape[0] for name, array in tensors.items() if ".lora_A." in name]
    if max(ranks, default=0) > max_rank:
        raise InputError(f"the adapter has rank {max(ranks)}, the vLLM engine takes {max_rank} at most: merge it")
    for name, array in tensors.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError(f"the adapter's {name} has numbers that are not finite: its training diverged")
    folder.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
