"""The forward of Llama-like models on a GPU in nine kernels a layer instead of transformers' fifty.

As `llama.py` on a CPU: linear layers and cache are the engine's own, and the decoder proves at load that the logits are
those of transformers' forward.

Shapes: T tokens, C hidden size, H heads, K key-value heads, D head dimensions.
"""

from typing import Any

import torch
from torch.nn import functional

from .cache import PagedCache
from .device import Places
from .linear import Joined


class DeviceLlama:
    """One forward of one shape over the paged cache; `model` must fit (`llama.fits`) and have the engine's layers."""

    def __init__(self, model: Any, cache: PagedCache, places: int) -> None:
        self._model, self._cache, self._head = model.model, cache, model.lm_head
        layers = self._model.layers
        attentions, mlps = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
        self._inputs = [Joined([a.q_proj, a.k_proj, a.v_proj]) for a in attentions]
        self._gates = [Joined([mlp.gate_proj, mlp.up_proj]) for mlp in mlps]
        self._heads: int = attentions[0].q_proj.out_features // attentions[0].head_dim
        self._scale: float = attentions[0].scaling
        embedded = self._model.embed_tokens.weight
        positions = torch.arange(places, device=embedded.device)[None]
        turns = self._model.rotary_emb(embedded[:1], positions)
        self._turns = (turns[0][0].float().contiguous(), turns[1][0].float().contiguous())

    def __call__(self, places: Places) -> torch.Tensor:
        """Logits of the places that are wanted, float32."""
        from .device_kernels import add_and_norm, silu_multiply

        x = functional.embedding(places.tokens, self._model.embed_tokens.weight)
        update: torch.Tensor | None = None
        for i, layer in enumerate(self._model.layers):
            normed = add_and_norm(x, update, *_norm(layer.input_layernorm))
            update = layer.self_attn.o_proj(self._attention(i, layer.self_attn, normed, places))
            normed = add_and_norm(x, update, *_norm(layer.post_attention_layernorm))
            update = layer.mlp.down_proj(silu_multiply(self._gates[i](normed)))
        normed = add_and_norm(x, update, *_norm(self._model.norm))
        return self._head(normed[places.wanted.long()]).float()

    def _attention(self, number: int, layer: Any, x: torch.Tensor, places: Places) -> torch.Tensor:
        from .device_kernels import rotate_and_store

        cache, norms = self._cache.layer(number), None
        if (norm := getattr(layer, "q_norm", None)) is not None:
            norms = (norm.weight, layer.k_norm.weight, norm.variance_epsilon)
        states = self._inputs[number](x)
        queries = rotate_and_store(states, self._heads, self._turns, norms, cache.keys, cache.values, places)
        return cache.attend_on_device(queries, places, self._scale, 0, 0.0).flatten(1)


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    return module.weight, module.variance_epsilon
