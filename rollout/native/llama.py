"""The forward of Llama-like models in a dozen calls a layer instead of transformers' sixty.

For small models most of a step is otherwise spent between the matrix products. So nothing but arrays goes from one
kernel to the next. Linear layers, norms and cache are the engine's own, so adapters and new weights work as everywhere;
the decoder proves at load that the logits are those of transformers' forward.

Shapes: T tokens, C hidden size, H heads, K key-value heads, D head dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import attention, kernels
from .cache import Batch, PagedCache
from .linear import EngineLinear
from .norms import EngineNorm

_MODELS = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_NONE = np.empty(0, np.float32)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def fits(model: Any) -> bool:
    """Whether `LlamaForward` or, on a GPU, `DeviceLlama` computes what this model does; asked after the engine's layers
    are in."""
    config = model.config
    return (
        type(model).__name__ in _MODELS
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
        and isinstance(model.lm_head, EngineLinear)
        and (
            model.device.type != "cpu"
            or all(isinstance(layer.input_layernorm, EngineNorm) for layer in model.model.layers)
        )
    )


class _Norm(NamedTuple):
    """A norm's weights, which new ones are copied into, and its epsilon."""

    weight: np.ndarray
    eps: np.float32

    @classmethod
    def of(cls, norm: Any) -> "_Norm":
        """Of an `EngineNorm`; of none, one that does nothing."""
        return cls(_NONE, np.float32(0)) if norm is None else cls(kernels.as_array(norm.weight.detach()), norm.eps)


class _Layer(NamedTuple):
    """What a decoder layer is made of."""

    before_attention: _Norm
    before_mlp: _Norm
    of_queries: _Norm
    of_keys: _Norm
    projections: tuple[EngineLinear, ...]
    """Of queries, keys, values, and of what attention gives."""
    gate: EngineLinear
    up: EngineLinear
    down: EngineLinear
    keys: np.ndarray
    values: np.ndarray
    scratch: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, layer: Any, cache: PagedCache, number: int, heads: int) -> "_Layer":
        """Of a model's layer and its part of the cache."""
        own, mlp, states = layer.self_attn, layer.mlp, cache.layer(number)
        return cls(
            before_attention=_Norm.of(layer.input_layernorm),
            before_mlp=_Norm.of(layer.post_attention_layernorm),
            of_queries=_Norm.of(getattr(own, "q_norm", None)),
            of_keys=_Norm.of(getattr(own, "k_norm", None)),
            projections=tuple(getattr(own, name) for name in _PROJECTIONS),
            gate=mlp.gate_proj,
            up=mlp.up_proj,
            down=mlp.down_proj,
            keys=kernels.as_array(states.keys),
            values=kernels.as_array(states.values),
            scratch=cache.scratch(states, heads).arrays,
        )


class LlamaForward:
    """One flat forward over the paged cache; `model` must fit."""

    def __init__(self, model: Any, cache: PagedCache) -> None:
        self._model = model.model
        self._head: EngineLinear = model.lm_head
        first = self._model.layers[0].self_attn
        self._size: int = first.head_dim
        self._limits = (np.float32(first.scaling), 0, np.float32(0))
        self._scratch = np.empty(self._size, np.float32)
        heads = first.q_proj.out_features // self._size
        self._layers = [_Layer.of(layer, cache, i, heads) for i, layer in enumerate(self._model.layers)]
        self._norm = _Norm.of(self._model.norm)

    def __call__(self, batch: Batch, wanted: Sequence[int]) -> torch.Tensor:
        """Logits `[len(wanted), V]`."""
        embedded = self._model.embed_tokens(torch.from_numpy(batch.tokens))
        cos, sin = self._model.rotary_emb(embedded, torch.from_numpy(batch.positions)[None])
        turns = (cos[0].float().numpy(), sin[0].float().numpy())
        x = kernels.as_array(embedded)
        update = np.zeros_like(x)
        for layer in self._layers:
            normed = _add_and_norm(x, update, layer.before_attention)
            update = self._attention(layer, normed, turns, batch)
            normed = _add_and_norm(x, update, layer.before_mlp)
            update = _mlp(layer, normed)
        normed = _add_and_norm(x, update, self._norm)
        return torch.from_numpy(self._head.on_arrays(normed[np.array(wanted, np.int64)]))

    def _attention(self, layer: _Layer, x: np.ndarray, turns: tuple[np.ndarray, ...], batch: Batch) -> np.ndarray:
        """`[T, C]` to the same; the tokens' keys and values go into the cache."""
        *inputs, output = layer.projections
        states = [_stored(f.on_arrays(x), x).reshape(len(x), -1, self._size) for f in inputs]
        queries, out = np.empty(states[0].shape, np.float32), np.empty(states[0].shape, np.float32)
        norms = (layer.of_queries.weight, layer.of_keys.weight, layer.of_queries.eps)
        cache, places = (layer.keys, layer.values), (batch.rows, batch.positions, batch.tables)
        attention.rotate_and_store(*states, *turns, *norms, *cache, *places, queries, self._scratch)  # pyright: ignore[reportCallIssue]
        attention.attend(queries, *cache, *places, *self._limits, out, *layer.scratch)  # pyright: ignore[reportCallIssue]
        return _stored(output.on_arrays(_stored(out.reshape(len(x), -1), x)), x)


def _add_and_norm(x: np.ndarray, update: np.ndarray, norm: _Norm) -> np.ndarray:
    """Adds `update` to `x` `[T, C]` in place; returns the norm of the sum."""
    out = np.empty_like(x)
    kernels.add_and_norm(x, update, norm.weight, norm.eps, out)
    return out


def _mlp(layer: _Layer, x: np.ndarray) -> np.ndarray:
    """SwiGLU, `[T, C]` to the same."""
    gate, up = _stored(layer.gate.on_arrays(x), x), _stored(layer.up.on_arrays(x), x)
    kernels.silu_multiply(gate.reshape(-1), up.reshape(-1))
    return _stored(layer.down.on_arrays(gate), x)


def _stored(numbers: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Float32 numbers as another array of the model keeps its own."""
    if like.dtype == np.float32:
        return numbers
    return kernels.as_array(torch.from_numpy(numbers).to(torch.bfloat16))
