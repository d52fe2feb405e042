"""The forward of Llama-like models in a dozen calls a layer instead of transformers' sixty.

For small models most of a step is otherwise spent between the matrix products. Linear layers, norms and cache are the
engine's own, so adapters and new weights work as everywhere; the decoder proves at load that the logits are those of
transformers' forward.

Shapes: T tokens, C hidden size, H heads, K key-value heads, D head dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from . import attention, kernels
from .cache import Batch, PagedCache
from .norms import EngineNorm

_MODELS = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_NONE = torch.empty(0)


def fits(model: Any) -> bool:
    """Whether `LlamaForward` or, on a GPU, `DeviceLlama` computes what this model does; asked after the engine's layers
    are in."""
    config = model.config
    return (
        type(model).__name__ in _MODELS
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
        and (
            model.device.type != "cpu"
            or all(isinstance(layer.input_layernorm, EngineNorm) for layer in model.model.layers)
        )
    )


class LlamaForward:
    """One flat forward over the paged cache; `model` must fit."""

    def __init__(self, model: Any, cache: PagedCache) -> None:
        self._model, self._cache = model.model, cache
        self._head: nn.Module = model.lm_head
        attention = self._model.layers[0].self_attn
        self._size: int = attention.head_dim
        self._scale = np.float32(attention.scaling)
        self._scratch = np.empty(self._size, np.float32)

    def __call__(self, batch: Batch, wanted: Sequence[int]) -> torch.Tensor:
        """Logits `[len(wanted), V]`."""
        x = self._model.embed_tokens(torch.from_numpy(batch.tokens))
        cos, sin = (part[0].float() for part in self._model.rotary_emb(x, torch.from_numpy(batch.positions)[None]))
        update = torch.zeros_like(x)
        for i, layer in enumerate(self._model.layers):
            normed = _add_and_norm(x, update, layer.input_layernorm)
            update = self._attention(i, layer.self_attn, normed, cos.numpy(), sin.numpy(), batch)
            normed = _add_and_norm(x, update, layer.post_attention_layernorm)
            update = _mlp(layer.mlp, normed)
        normed = _add_and_norm(x, update, self._model.norm)
        return self._head(normed[torch.tensor(wanted, dtype=torch.long)])

    def _attention(
        self, number: int, layer: Any, x: torch.Tensor, cos: np.ndarray, sin: np.ndarray, batch: Batch
    ) -> torch.Tensor:
        """`[T, C]` to the same; the tokens' keys and values go into the cache."""
        cache = self._cache.layer(number)
        q, k, v = (f(x).view(len(x), -1, self._size) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
        q_norm, k_norm = getattr(layer, "q_norm", None), getattr(layer, "k_norm", None)
        q_weight, k_weight = (_NONE if norm is None else norm.weight.detach() for norm in (q_norm, k_norm))
        eps = np.float32(0) if q_norm is None else q_norm.eps
        queries, out = torch.empty(q.shape), torch.empty(q.shape)
        tensors = (kernels.as_array(tensor) for tensor in (q, k, v))
        weights = (kernels.as_array(q_weight), kernels.as_array(k_weight), eps)
        keys, values = kernels.as_array(cache.keys), kernels.as_array(cache.values)
        places = (batch.rows, batch.positions, batch.tables)
        attention.rotate_and_store(*tensors, cos, sin, *weights, keys, values, *places, queries.numpy(), self._scratch)  # pyright: ignore[reportCallIssue]
        limits = (self._scale, 0, np.float32(0))
        scratch = self._cache.scratch(cache, queries.shape[1]).arrays
        attention.attend(queries.numpy(), keys, values, *places, *limits, out.numpy(), *scratch)  # pyright: ignore[reportCallIssue]
        return layer.o_proj(out.view(len(x), -1).to(x.dtype))


def _add_and_norm(x: torch.Tensor, update: torch.Tensor, norm: EngineNorm) -> torch.Tensor:
    """Adds `update` to `x` `[T, C]` in place; returns the norm of the sum."""
    out = torch.empty_like(x)
    weight = kernels.as_array(norm.weight.detach())
    kernels.add_and_norm(kernels.as_array(x), kernels.as_array(update), weight, norm.eps, kernels.as_array(out))
    return out


def _mlp(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU, `[T, C]` to the same."""
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    kernels.silu_multiply(*(kernels.as_array(part.view(-1)) for part in (gate, up)))
    return layer.down_proj(gate)
