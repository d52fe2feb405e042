"""LoRA adapters on the engine's linear layers: unmerged, and a different one for every row of a forward.

A row's result must not depend on the adapters of the other rows. Matrix products of at least four rows give each row
the same bits (measured; `self_check` proves it where the engine runs), so rows that share an adapter are computed
together in tiles of eight, and a forward with a single adapter is the same product without the sorting.

Shapes: k rows (or tokens of one prompt), t tiles, r rank, I inputs, O outputs.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...cluster.errors import InputError

TILE = 8
_RANK_UNIT = 16

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


def parse_adapter(tensors: dict[str, np.ndarray], config: dict[str, Any], layers: dict[str, nn.Module]) -> Adapter:
    """Read PEFT's tensors and settings for the model's linear `layers`.

    Raises `InputError` for a kind of adapter that is not plain LoRA, a layer or shape the model does not have, and
    numbers that are not finite.
    """
    _check_config(config)
    pairs: dict[str, list[torch.Tensor | None]] = defaultdict(lambda: [None, None])
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
    if not np.isfinite(array).all():
        raise InputError(f"the adapter's {name} has numbers that are not finite: its training diverged")
    return torch.from_numpy(np.array(array, np.float32))


def _features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    linear: Any = layer
    return linear.in_features, linear.out_features


def _factors(
    name: str, a: torch.Tensor | None, b: torch.Tensor | None, config: dict[str, Any], layer: nn.Module
) -> Factors:
    if a is None or b is None:
        raise InputError(f"the adapter has only one of lora_A and lora_B for {name}")
    inputs, outputs = _features(layer)
    rank = a.shape[0]
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise InputError(
            f"the adapter's shapes {tuple(a.shape)}, {tuple(b.shape)} do not fit {name} "
            f"({inputs} inputs, {outputs} outputs): it was trained on another base"
        )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    padding = -rank % _RANK_UNIT
    return Factors(functional.pad(a, (0, 0, 0, padding)), functional.pad(b * scale, (0, padding)))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows whose adapters have one rank, sorted by adapter into tiles of eight."""

    adapters: tuple[str, ...]
    """Digest of each tile, `[t]`."""
    gather: torch.Tensor
    """The row of each place in the tiles, `[t * 8]`; a short tile repeats a row."""
    rows: torch.Tensor
    """The rows, each once."""
    places: torch.Tensor
    """The place in the tiles of each of `rows`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows of a forward use which adapter: `single` for all rows alike, otherwise `tiles`."""

    single: str | None = None
    tiles: tuple[Tiles, ...] = ()


class LoraLinear(nn.Module):
    """A linear layer and the factors of every loaded adapter that targets it; the bank's plan says who uses which."""

    def __init__(self, base: nn.Module, bank: "LoraBank") -> None:
        super().__init__()
        self.base = base
        self.factors: dict[str, Factors] = {}
        self._bank = [bank]  # in a list, so that it is not taken for a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        result = self.base(x)
        plan = self._bank[0].plan
        if plan is None:
            return result
        flat = x.reshape(-1, x.shape[-1]).float()
        if plan.single is not None:
            factors = self.factors.get(plan.single)
            if factors is None:
                return result
            delta = functional.linear(functional.linear(flat, factors.a), factors.b)
            return (result + delta.view(result.shape)).to(result.dtype)
        total = result.reshape(-1, result.shape[-1])
        for tiles in plan.tiles:
            total = self._add(total, flat, tiles)
        return total.view(result.shape)

    def _add(self, total: torch.Tensor, x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        if not any(digest in self.factors for digest in tiles.adapters):
            return total
        rank = next(self.factors[d].a.shape[0] for d in tiles.adapters if d in self.factors)
        none = self._nothing(rank, x.shape[1], total.shape[1], x.device)
        factors = [self.factors.get(digest, none) for digest in tiles.adapters]
        a = torch.stack([f.a for f in factors]).transpose(1, 2)
        b = torch.stack([f.b for f in factors]).transpose(1, 2)
        tiled = x[tiles.gather].view(len(factors), TILE, -1)
        delta = torch.bmm(torch.bmm(tiled, a), b).view(-1, total.shape[1])[tiles.places]
        total[tiles.rows] = (total[tiles.rows] + delta).to(total.dtype)
        return total

    @staticmethod
    def _nothing(rank: int, inputs: int, outputs: int, device: torch.device) -> Factors:
        return Factors(torch.zeros(rank, inputs, device=device), torch.zeros(outputs, rank, device=device))


class LoraBank:
    """All adapters loaded on one model. Layers are wrapped when the first adapter targets them, so that a base-only
    engine does not pay for any."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.plan: Plan | None = None
        self._model = model
        self._device = device
        self._layers: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) or hasattr(module, "out_features")
        }
        self._wrapped: dict[str, LoraLinear] = {}
        self._ranks: dict[str, int] = {}

    def digests(self) -> tuple[str, ...]:
        """The loaded adapters."""
        return tuple(self._ranks)

    def load(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Add an adapter, all of it or nothing; one that is loaded already stays. Raises `InputError`."""
        if digest in self._ranks:
            return
        adapter = parse_adapter(tensors, config, self._layers)
        ranks = {factors.a.shape[0] for factors in adapter.values()}
        rank = max(ranks)
        for name, factors in adapter.items():
            self._wrap(name).factors[digest] = _widened(factors, rank, self._device)
        self._ranks[digest] = rank

    def drop(self, digest: str) -> None:
        """Forget an adapter. Raises `InputError` when it is not loaded."""
        if digest not in self._ranks:
            raise InputError(f"adapter {digest[:12]} is not loaded")
        del self._ranks[digest]
        for layer in self._wrapped.values():
            layer.factors.pop(digest, None)

    def _wrap(self, name: str) -> LoraLinear:
        if name not in self._wrapped:
            parent, _, child = name.rpartition(".")
            self._wrapped[name] = LoraLinear(self._layers[name], self)
            setattr(self._model.get_submodule(parent), child, self._wrapped[name])
        return self._wrapped[name]

    def plan_for(self, adapters: Sequence[str | None]) -> Plan | None:
        """How to compute rows with these adapters (none for the base model); None when no row has one."""
        distinct = set(adapters)
        if distinct == {None}:
            return None
        if len(distinct) == 1:
            return Plan(single=adapters[0])
        by_rank: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, digest in enumerate(adapters):
            if digest is not None:
                by_rank[self._ranks[digest]][digest].append(row)
        return Plan(tiles=tuple(_tiles(groups, self._device) for groups in by_rank.values()))


def _widened(factors: Factors, rank: int, device: torch.device) -> Factors:
    """The same adapter on its device, with its rank padded further where its layers have different ranks."""
    padding = rank - factors.a.shape[0]
    a, b = functional.pad(factors.a, (0, 0, 0, padding)), functional.pad(factors.b, (0, padding))
    return Factors(a.to(device), b.to(device))


def _tiles(groups: dict[str, list[int]], device: torch.device) -> Tiles:
    adapters: list[str] = []
    gather: list[int] = []
    rows: list[int] = []
    places: list[int] = []
    for digest, members in groups.items():
        places += range(len(gather), len(gather) + len(members))
        rows += members
        padding = -len(members) % TILE
        gather += members + [members[0]] * padding
        adapters += [digest] * ((len(members) + padding) // TILE)
    index = [torch.tensor(numbers, device=device) for numbers in (gather, rows, places)]
    return Tiles(tuple(adapters), *index)
