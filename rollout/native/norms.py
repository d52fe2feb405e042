"""RMS norms in one pass over memory instead of transformers' six, where they provably compute the same."""

from typing import Any

import numpy as np
import torch
from torch import nn

from . import kernels


class EngineNorm(nn.Module):
    """`x / rms(x) · (offset + weight)`; keeps the original's parameter, so that new weights take effect."""

    def __init__(self, weight: nn.Parameter, offset: float, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.offset, self.eps = np.float32(offset), np.float32(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to the same shape."""
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, result = (kernels.as_array(t.view(-1, x.shape[-1])) for t in (x, out))
        kernels.rms_norm(rows, kernels.as_array(self.weight.detach()), self.offset, self.eps, result)
        return out


def replace_norms(model: nn.Module) -> None:
    """Put an `EngineNorm` in the place of every norm on a CPU that gives the same numbers on random ones."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and (norm := _same(module)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)


def _same(module: Any) -> EngineNorm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or weight.device.type != "cpu" or not isinstance(eps, float):
        return None
    x = torch.randn((4, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    wanted = module(x).float()
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        norm = EngineNorm(weight, offset, eps)
        if torch.allclose(norm(x).float(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())):
            return norm
    return None
