"""Weights that learn: their optimizer, the updates of a step, and the files of both."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...cluster.errors import RunFailed
from ..schedule import learning_rate, update_rows
from ..stages import OnlineStage
from .batch import TrainSample
from .losses import Metrics, averaged
from .ranks import Ranks, shared_like, whole

Backward = Callable[[Sequence[TrainSample]], Metrics]
"""Adds the gradient of one update's loss on its samples; the metrics are those of `joined`."""


class Learner:
    """Parameters with AdamW, as one role of a stage trains them; `name` is that of its files and of its errors."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        stage: OnlineStage,
        seed: int,
        *,
        peak: float,
        ranks: Ranks,
    ) -> None:
        self._name, self._stage, self._seed, self._peak, self._ranks = name, stage, seed, peak, ranks
        self._trained = {n: p for n, p in parameters.items() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=peak, betas=stage.betas, weight_decay=stage.weight_decay
        )

    def learn(self, samples: Sequence[TrainSample], step: int, backward: Backward) -> Metrics:
        """A step's updates: its epochs over the samples, each in minibatches. Raises `RunFailed` on a NaN gradient.

        Metrics are means over the tokens of all updates; `updated` says whether the weights moved.
        """
        rate = learning_rate(self._stage, step, self._stage.steps, peak=self._peak)
        self._optimizer.param_groups[0]["lr"] = rate
        parts, norms = [], []
        for rows in update_rows(self._seed, step, len(samples), self._stage.epochs, self._stage.minibatches):
            chosen = [samples[i] for i in rows]
            metrics, norm = self._update(chosen, step, backward)
            parts.append((sum(len(s.tokens) for s in chosen), metrics))
            norms.append(norm)
        told = {"grad_norm": float(np.mean(norms)), "grad_norm/max": max(norms), "updates": float(len(norms))}
        return averaged(parts) | told | {"learning_rate": rate, "updated": float(max(norms) > 0 and rate > 0)}

    def _update(self, samples: Sequence[TrainSample], step: int, backward: Backward) -> tuple[Metrics, float]:
        """One optimizer step: its metrics and the norm of its gradient before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        metrics = backward(samples)
        norm = self._clip().item()
        if not np.isfinite(norm):
            losses = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.endswith("loss"))
            raise RunFailed(
                f"step {step}: the gradient of the {self._name} is {norm} ({losses}): lower its learning_rate "
                f"(now {self._peak:g}) or look at this step's rewards"
            )
        self._optimizer.step()
        return metrics, norm

    def _clip(self) -> torch.Tensor:
        """Bound the norm of the gradient of all ranks; what it was before."""
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(self._trained.values(), self._stage.max_grad_norm, norm)
        return norm

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state as safetensors. Raises `RunFailed` where they cannot be written."""
        from safetensors import SafetensorError

        try:
            self._write(folder)
        except (OSError, SafetensorError) as error:  # a full disk, which another attempt would find full too
            raise RunFailed(f"the {self._name} cannot write its checkpoint {folder}: {error}") from error

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        moments = {}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value
        for part, tensors in (("", self._trained), ("-optimizer", moments)):
            led = self._ranks.led(tensors)
            if self._ranks.leads:
                held = {name: tensor.contiguous().cpu() for name, tensor in led.items()}
                save_file(held, folder / f"{self._name}{part}.safetensors")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `RunFailed` when it is of another set of weights."""
        from safetensors.torch import load_file

        weights = load_file(folder / f"{self._name}.safetensors")
        shapes = {n: tuple(w.shape) for n, w in weights.items()}
        if shapes != {n: tuple(p.shape) for n, p in self._trained.items()}:
            raise RunFailed(
                f"{folder} is a checkpoint of another adapter or model: its tensors have other names or shapes"
            )
        moments = load_file(folder / f"{self._name}-optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(shared_like(weights[name], parameter))
                prefix = f"{name}/"
                state = {k.removeprefix(prefix): v for k, v in moments.items() if k.startswith(prefix)}
                if state:
                    self._optimizer.state[parameter] = {
                        k: v if k == "step" else shared_like(v, parameter) for k, v in state.items()
                    }
