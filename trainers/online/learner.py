"""Weights that learn: their optimizer, the updates of a step, and the files of both."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...cluster.errors import RunFailed
from ..schedule import learning_rate, update_rows
from ..stages import OnlineStage
from . import shards
from .batch import TrainSample
from .checkpoints import Written
from .losses import Metrics, averaged
from .ranks import Ranks, whole
from .shards import Shards

Backward = Callable[[Sequence[TrainSample]], tuple[int, Metrics]]
"""Adds the gradient of one update's loss on its samples; how many tokens it computed, and the metrics of `joined`."""


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
        self._name, self._stage, self._seed, self._peak = name, stage, seed, peak
        self._trained = {n: p for n, p in parameters.items() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=peak, betas=stage.betas, weight_decay=stage.weight_decay
        )
        self._ranks = ranks
        self._shards = Shards(name, ranks.device, ranks.rank)

    def learn(self, samples: Sequence[TrainSample], step: int, backward: Backward) -> Metrics:
        """A step's updates: its epochs over the samples, each in minibatches. Raises `RunFailed` on a NaN gradient.

        Metrics are means over the tokens that all updates computed; `updated` says whether the weights moved. Samples
        that move nothing make no update of a minibatch that has no others.
        """
        rate = learning_rate(self._stage, step, self._stage.steps, peak=self._peak)
        self._optimizer.param_groups[0]["lr"] = rate
        parts, norms = [], []
        for rows in update_rows(self._seed, step, len(samples), self._stage.epochs, self._stage.minibatches):
            chosen = [samples[i] for i in rows]
            tokens, metrics, norm = self._update(chosen, step, backward)
            parts.append((tokens, metrics))
            norms.append(norm)
        told = {"grad_norm": float(np.mean(norms)), "grad_norm/max": max(norms), "updates": float(len(norms))}
        return averaged(parts) | told | {"learning_rate": rate, "updated": float(max(norms) > 0 and rate > 0)}

    def _update(self, samples: Sequence[TrainSample], step: int, backward: Backward) -> tuple[int, Metrics, float]:
        """One optimizer step: its tokens, their metrics and the norm of its gradient before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        tokens, metrics = backward(samples)
        self._ranks.add_up(self._trained.values())
        norm = self._clip().item()
        if not np.isfinite(norm):
            losses = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.endswith("loss"))
            raise RunFailed(
                f"step {step}: the gradient of the {self._name} is {norm} ({losses}): lower its learning_rate "
                f"(now {self._peak:g}) or look at this step's rewards"
            )
        self._optimizer.step()
        return tokens, metrics, norm

    def _clip(self) -> torch.Tensor:
        """Bound the norm of the gradient of all ranks; what it was before."""
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(self._trained.values(), self._stage.max_grad_norm, norm)
        return norm

    def save(self, folder: Path) -> None:
        """Copy weights and optimizer state, and write them to a checkpoint's folder while training goes on."""
        self._shards.begin(self._state(), folder)

    def written(self, *, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come. Raises `RunFailed` where nothing could be written."""
        return self._shards.written(wait=wait)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, with any number of ranks. Raises `RunFailed` when it is of other weights."""
        saved = shards.sizes(folder, self._name)
        if not saved:
            raise RunFailed(
                f"{folder} has no shards of the {self._name}: an older raylign wrote it; begin another run with --name"
            )
        if {k: s for k, s in saved.items() if k.startswith("weights/")} != {k: w.shape for k, w in self._weights()}:
            raise RunFailed(
                f"{folder} is a checkpoint of another adapter or model: its tensors have other names or shapes"
            )
        self._optimizer.state.clear()
        for name, key in (k.split("/")[1:] for k in saved if k.startswith("optimizer/")):
            parameter = self._trained[name]
            self._optimizer.state[parameter][key] = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        shards.read(self._state(), folder, self._name)

    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        return [(f"weights/{name}", parameter.detach()) for name, parameter in self._trained.items()]

    def _state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint has of it: views, good until the next update."""
        state = dict(self._weights())
        for name, parameter in self._trained.items():
            moments = self._optimizer.state.get(parameter, {})
            state |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
        return state
