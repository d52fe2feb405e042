"""Bytes of every item on one device of a role. Pure: numbers in, numbers out.

| item | bytes |
|---|---|
| weights | 2 or 4 a parameter; NF4 0.516 a packed one (4 bits, a byte of scale for 64, a float for 256 scales) |
| gradients | as the trained parameters |
| optimizer | AdamW's two moments, 8 a trained parameter (float32 whatever the weights are) |
| activations | what a forward saves for its backward; with checkpointing a layer's input each and one layer whole |
| logits | what is of the vocabulary's size at once |
| kv_cache | keys and values of all slots |
| headroom | a tenth of the rest: the allocator's gaps, temporaries, libraries |
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from .footprint import Footprint

WIDTH = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation (QLoRA 2305.14314, section 3): 64 share a scale of 8 bits, 256 of these a
float32."""
HEADROOM = 0.10
ERROR_BAND = (0.85, 1.15)
"""Measured over estimated of what is not exact (activations and logits), on the models of the benchmark `plan`."""

_MOMENTS = 8
_ADAPTER_WIDTH = 4  # PEFT keeps an adapter in float32 on a base of any type
_LOSS_COPIES = 2
"""Beside what is saved: the logits, and a gradient."""
_TILE = (4096, 32768)  # tokens and part of the vocabulary that TRL's fused head has in hand
_TILE_COPIES = {"cpu": 7, "gpu": 1}
"""In float32, beside the tile: Triton's kernels work in place, torch's operations do not."""
_ONLINE_CHUNK = 4 * (1 << 22)  # float32 logits in hand in trainers/online/head.py
_ONLINE_COPIES = 5

Logits = Literal["full", "tiles", "chunk"]
"""How a loss makes its logits: all at once, in tiles of the vocabulary (TRL), or in chunks of tokens (online roles)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Bytes of each item, on one device or on several together."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    headroom: float = 0.0

    @property
    def state(self) -> float:
        """The model's own state: what is there between two steps, and the gradients."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All items together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def gigabytes(self) -> dict[str, float]:
        """In 1e9 bytes."""
        return {name: round(value / 1e9, 4) for name, value in asdict(self).items()}

    def with_headroom(self) -> "Items":
        """The same with a tenth of it on top."""
        return replace(self, headroom=HEADROOM * (self.total - self.headroom))


def weights(model: Footprint, dtype: str, *, quantized: bool = False, adapter: bool = False) -> float:
    """Bytes of a whole model, with its adapter if it has one."""
    width = WIDTH[dtype]
    packed = model.linear if quantized else 0
    return packed * NF4_BYTES + (model.parameters - packed) * width + (model.trained * _ADAPTER_WIDTH if adapter else 0)


def learner(
    model: Footprint,
    dtype: str,
    *,
    adapter: bool,
    quantized: bool = False,
    tokens: int,
    logits: Logits,
    checkpointing: bool = False,
    shards: int = 1,
    device: Literal["cpu", "gpu"] = "cpu",
) -> Items:
    """One device of a role that learns; `model` was measured with the tokens of one forward.

    With several `shards` the state is cut into so many parts, activations are not.
    """
    trained = model.trained * (_ADAPTER_WIDTH if adapter else WIDTH[dtype])
    return Items(
        weights=weights(model, dtype, quantized=quantized, adapter=adapter) / shards,
        gradients=trained / shards,
        optimizer=model.trained * _MOMENTS / shards,
        activations=_activations(model, dtype, tokens, checkpointing),
        logits=_logits(model, tokens, logits, WIDTH[dtype], device),
    ).with_headroom()


def reader(
    model: Footprint, dtype: str, *, quantized: bool = False, adapter: bool, tokens: int, logits: bool = True
) -> Items:
    """One device of a role that computes and never learns: a reference or a reward model."""
    one_layer = 6 * tokens * model.width * WIDTH[dtype]
    return Items(
        weights=weights(model, dtype, quantized=quantized, adapter=adapter),
        activations=one_layer,
        logits=_ONLINE_CHUNK * _ONLINE_COPIES if logits else 0,
    ).with_headroom()


def engine(model: Footprint, dtype: str, *, adapter: bool, rows: int, length: int, block: int = 32) -> Items:
    """One rollout worker: weights, and a cache of `rows` rows of `length` tokens in whole blocks."""
    held = rows * math.ceil(length / block) * block
    return Items(
        weights=weights(model, dtype, adapter=adapter),
        kv_cache=held * model.cache_per_token * WIDTH[dtype],
        logits=rows * model.vocabulary * 4 * 2,
    ).with_headroom()


def _activations(model: Footprint, dtype: str, tokens: int, checkpointing: bool) -> float:
    if not checkpointing:
        return model.activations
    inputs = model.layers * tokens * model.width * WIDTH[dtype]
    return inputs + model.activations / model.layers


def _logits(model: Footprint, tokens: int, kind: Logits, width: int, device: str) -> float:
    if kind == "full":
        return model.logits + _LOSS_COPIES * tokens * model.vocabulary * 4
    if kind == "tiles":
        held = min(tokens, _TILE[0])
        return held * (_TILE[1] * width + _TILE_COPIES[device] * min(model.vocabulary, _TILE[1]) * 4)
    return min(_ONLINE_CHUNK, tokens * model.vocabulary * 4) * _ONLINE_COPIES
