"""Mixtures of experts on a CPU: every token's own experts, with the same bits in any company.

transformers multiplies all tokens of an expert at once by torch's product, whose bits depend on how many there are.

Shapes: T tokens, k experts a token, S = T · k, C hidden size, I intermediate size, P panels.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from . import kernels, matmul
from .linear import Shared


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts' weights in transformers' stacked form."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts", "down_proj"))


class EngineExperts(nn.Module):
    """Stands in for a module of transformers' experts interface, with the same names and shapes of its parameters."""

    def __init__(self, experts: nn.Module, shared: Shared) -> None:
        super().__init__()
        source: Any = experts
        self._source = [source]  # in a list, so that its parameters are not ours a second time
        self._up, self._shared = "gate_up_proj" if source.has_gate else "up_proj", shared
        for name, parameter in source.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self._packed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.pack()

    def pack(self) -> None:
        """Take over what the parameters hold now."""
        for name in (self._up, "down_proj"):
            weights: torch.Tensor = getattr(self, name).detach()
            weights = weights.mT.contiguous() if self._source[0].is_transposed else weights
            pairs = weights.dtype == torch.bfloat16 and weights.shape[2] % 2 == 0
            weights = weights if pairs else weights.float()
            if name not in self._packed:
                self._packed[name] = [self._room(w, pairs) for w in weights]
            bias: torch.Tensor | None = getattr(self, f"{name}_bias", None)
            for i, (panels, start) in enumerate(self._packed[name]):
                matmul.pack(kernels.as_array(weights[i]), panels)
                if bias is not None:
                    start[: bias.shape[1]] = bias[i].detach().float().numpy()

    def _room(self, weight: torch.Tensor, pairs: bool) -> tuple[np.ndarray, np.ndarray]:
        outputs, inputs = weight.shape
        shape = matmul.panels(outputs, inputs, pairs)
        panels = self._shared.memory.zeros(shape, np.uint32 if pairs else np.float32)
        return panels, np.zeros(shape[0] * matmul.PANEL, np.float32)

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`[T, C]` to the same; `top_k_index` and `top_k_weights` `[T, k]`."""
        source, k = self._source[0], top_k_index.shape[1]
        chosen = top_k_index.reshape(-1).numpy()
        up = self._multiply(self._up, x.repeat_interleave(k, dim=0), chosen).to(x.dtype)
        hidden = source._apply_gate(up) if source.has_gate else source.act_fn(up)
        out = self._multiply("down_proj", hidden, chosen).to(x.dtype)
        out = source.post_expert_norm(out) if source.has_post_expert_norm else out
        weighted = out * top_k_weights.reshape(-1, 1)
        return weighted.view(len(x), k, -1).sum(1).to(x.dtype)

    def _multiply(self, name: str, x: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
        """Each row of `x` `[S, …]` by its own expert's weights, float32."""
        packed = self._packed[name]
        parameter: torch.Tensor = getattr(self, name)
        out = np.empty((len(x), parameter.shape[2 if self._source[0].is_transposed else 1]), np.float32)
        pairs = packed[0][0].dtype == np.uint32
        given = kernels.as_array((x.to(torch.bfloat16) if pairs else x.float()).contiguous())
        given = given.view(np.uint32) if pairs else given
        for expert in np.unique(chosen):
            rows = np.flatnonzero(chosen == expert)
            some = np.empty((len(rows), out.shape[1]), np.float32)
            panels, start = packed[expert]
            self._shared.multiply(given[rows], panels, start, some)
            out[rows] = some
        return torch.from_numpy(out)


def replace_experts(model: nn.Module, shared: Shared) -> list[EngineExperts]:
    """Put `EngineExperts` in the place of every such module on a CPU."""
    replaced: list[EngineExperts] = []
    for name, module in list(model.named_modules()):
        if is_experts(module) and next(module.parameters()).device.type == "cpu":
            parent, _, child = name.rpartition(".")
            replaced.append(EngineExperts(module, shared))
            setattr(model.get_submodule(parent), child, replaced[-1])
    return replaced
