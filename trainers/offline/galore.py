"""GaLore's optimizer: AdamW whose moments of a matrix live in a subspace of its gradient.

Own code, since the authors' package has had no release since its first; the algorithm is 2403.03507, algorithm 2.
"""

from collections.abc import Callable
from typing import Any

import torch


class GaloreAdamW(torch.optim.Optimizer):
    """AdamW, for matrices `[O, I]` in the space of the first `r` singular vectors of the gradient's shorter side.

    Groups with `rank` None are plain AdamW. `update_every` steps lie between two subspaces, `scale` multiplies
    projected updates. Its state (moments, projection, step) is all in `state_dict`, so that a resume goes on exactly.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0, eps: float = 1e-8
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"rank": None, "update_every": 200, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step on all parameters that have a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)
        return loss


def _update(parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    grad, rank = parameter.grad.float(), group["rank"]
    done = state.get("step", 0)
    if rank is not None:
        if done % group["update_every"] == 0:
            state["projection"] = subspace(grad, rank)
        grad = _into(grad, state["projection"])
    if not state.get("step"):
        state |= {"exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
    state["step"] = done + 1
    (first, second), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    corrected = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    change = mean / (1 - first ** state["step"]) / corrected
    if rank is not None:
        change = group["scale"] * _out(change, state["projection"], parameter.shape)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(change.to(parameter.dtype), alpha=-group["lr"])


def subspace(grad: torch.Tensor, rank: int) -> torch.Tensor:
    """The first singular vectors of the shorter side, `[shorter, r]`."""
    short = grad if grad.shape[0] <= grad.shape[1] else grad.T
    return torch.linalg.svd(short, full_matrices=False).U[:, :rank].contiguous()


def _into(grad: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    return projection.T @ grad if grad.shape[0] <= grad.shape[1] else grad @ projection


def _out(change: torch.Tensor, projection: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return projection @ change if shape[0] <= shape[1] else change @ projection.T
