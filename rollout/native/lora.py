"""LoRA adapters on the engine's linear layers: unmerged, and a different one for every token of a forward.

Shapes: T tokens, r rank, I inputs, O outputs.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ...cluster.errors import InputError
from .linear import EngineLinear

_RANK_UNIT = 16
"""Ranks are padded to a multiple of this, a vector of the processor."""

_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}
_UNKNOWN = (
    "use_dora",
    "modules_to_save",
    "alpha_pattern",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""PEFT settings that change what an adapter computes and that this engine does not compute."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's adapter in float32: `a` `[r, I]`, `b` `[O, r]`; the rank is padded, the scale multiplied into `b`."""

    a: torch.Tensor
    b: torch.Tensor


Adapter = dict[str, Factors]
"""By the name of the layer."""


def parse_adapter(
    tensors: dict[str, np.ndarray], config: dict[str, Any], layers: Mapping[str, EngineLinear]
) -> Adapter:
    """Read PEFT's tensors and settings for the model's linear `layers`.

    Raises `InputError` for a kind of adapter that is not plain LoRA, a layer or shape the model does not have, and
    numbers that are not finite.
    """
    _check_config(config)
    pairs: dict[str, list[torch.Tensor | None]] = defaultdict(lambda: [None, None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory that is read-only: it may be the object store's
        for name, array in tensors.items():
            layer, factor = _place(name)
            if layer not in layers:
                raise InputError(f"the adapter's {name} has no layer in this model: it was trained on another base")
            pairs[layer][factor] = _finite(name, array)
    if not pairs:
        raise InputError("the adapter has no tensors")
    return {layer: _factors(layer, a, b, config, layers[layer]) for layer, (a, b) in pairs.items()}


def _check_config(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise InputError(f"the adapter's peft_type is {kind!r}: the native engine serves LORA")
    if not isinstance(config.get("lora_alpha"), int | float) or not config.get("r"):
        raise InputError("the adapter's config lacks r or lora_alpha: give PEFT's adapter_config.json")
    if config.get("bias", "none") != "none":
        raise InputError(f"the adapter has bias={config['bias']!r}: train it with bias='none'")
    for key in _UNKNOWN:
        if config.get(key):
            raise InputError(f"the adapter has {key}={config[key]!r}, which the native engine cannot serve: merge it")


def _place(name: str) -> tuple[str, int]:
    for ending, factor in _FACTORS.items():
        if name.startswith(_PREFIX) and name.endswith(ending):
            return name[len(_PREFIX) : -len(ending)], factor
    raise InputError(f"the adapter's tensor {name!r} is not a LoRA factor ({_PREFIX}….lora_A.weight or lora_B.weight)")


def _finite(name: str, array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory where that is float32; nobody writes to it."""
    numbers = np.ascontiguousarray(array, np.float32)
    # a sum of squares takes a tenth of the time and is finite only where all are; it may also be too large
    if not np.isfinite(np.vdot(numbers, numbers)) and not np.isfinite(numbers).all():
        raise InputError(f"the adapter's {name} has numbers that are not finite: its training diverged")
    return torch.from_numpy(numbers)


def _factors(
    name: str, a: torch.Tensor | None, b: torch.Tensor | None, config: dict[str, Any], layer: EngineLinear
) -> Factors:
    if a is None or b is None:
        raise InputError(f"the adapter has only one of lora_A and lora_B for {name}")
    inputs, outputs = layer.in_features, layer.out_features
    rank = a.shape[0]
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise InputError(
            f"the adapter's shapes {tuple(a.shape)}, {tuple(b.shape)} do not fit {name} "
            f"({inputs} inputs, {outputs} outputs): it was trained on another base"
        )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    scaled, padding = b * scale, -rank % _RANK_UNIT
    if padding:
        a, scaled = functional.pad(a, (0, 0, 0, padding)), functional.pad(scaled, (0, padding))
    return Factors(a, scaled)


class LoraBank:
    """All adapters loaded on one model's linear layers, by digest; the layers hold the factors."""

    def __init__(self, layers: Mapping[str, EngineLinear]) -> None:
        self._layers = layers
        self._numbers: dict[str, int] = {}

    def digests(self) -> tuple[str, ...]:
        """The loaded adapters."""
        return tuple(self._numbers)

    def number(self, digest: str | None) -> int:
        """The number by which a batch names an adapter; -1 is the base model."""
        return -1 if digest is None else self._numbers[digest]

    def load(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Add an adapter, all of it or nothing; one that is loaded already stays. Raises `InputError`."""
        if digest in self._numbers:
            return
        adapter = parse_adapter(tensors, config, self._layers)
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers.values())
        for name, layer in self._layers.items():
            if factors := adapter.get(name):
                layer.put(number, factors.a, factors.b)
            else:
                layer.remove(number)
        self._numbers[digest] = number

    def drop(self, digest: str) -> None:
        """Forget an adapter. Raises `InputError` when it is not loaded."""
        if digest not in self._numbers:
            raise InputError(f"adapter {digest[:12]} is not loaded")
        number = self._numbers.pop(digest)
        for layer in self._layers.values():
            layer.remove(number)
