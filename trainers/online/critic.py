"""The critic role: a value for every token, learned beside the policy. A plain class around a model, and its Ray shell.

Shapes: as in `scoring_model.py`; D the model's width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster.imports import importing
from ...cluster.process_group import Seat
from .batch import TrainSample
from .checkpoints import Written
from .policy import PolicySpec, device_of


class Critic:
    """The policy's model as it stood when the stage began, with a linear head on the last hidden state instead of the
    vocabulary's. What trains besides the head is what trains of the policy: an adapter, or all weights.

    The head begins at 0, so that before the first update every value is 0 and advantages are those of the rewards.
    """

    def __init__(self, spec: PolicySpec, seat: Seat | None = None) -> None:
        with importing():
            import torch
            from peft import PeftModel

            from ..adapters import open_model
            from .learner import Learner
            from .ranks import Ranks
            from .valuer import Valuer

        assert spec.stage.critic, "a stage without a critic starts none"
        self._stage, self._config = spec.stage, spec.stage.critic
        torch.set_num_threads(max(1, int(self._config.resources.cpus)))
        self._ranks = Ranks(device_of(self._config.resources.gpus), seat)
        model = open_model(spec.base, spec.adapter, spec.stage.adapter, seed=spec.seed, dtype=spec.dtype)
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        valuer = Valuer(whole.base_model, whole.config.get_text_config().hidden_size)
        recompute = self._config.resources.activation_checkpointing
        self._model = self._ranks.spread(valuer, recompute=recompute).eval()
        parameters = dict(self._model.named_parameters())
        rate = self._config.learning_rate
        self._learner = Learner("critic", parameters, spec.stage, spec.seed, peak=rate, ranks=self._ranks)

    def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """What is still to come, as the critic sees it before each completion token; `[T]` of each sample."""
        from .scoring_model import of_each_sample

        return of_each_sample(self._model, samples, self._stage.micro_batch_tokens, self._ranks)

    def update(self, samples: Sequence[TrainSample], step: int) -> dict[str, float]:
        """The updates of a step towards the samples' `returns`, in the same minibatches as the policy's.

        Without samples nothing changes. Raises `RunFailed` on a NaN gradient.
        """
        if not samples:
            return {}
        told = self._learner.learn(samples, step, self._backward)
        returns = np.concatenate([s.returns for s in samples if s.returns is not None])
        values = np.concatenate([s.values for s in samples if s.values is not None])
        left = float(np.var(returns - values, dtype=np.float64) / max(np.var(returns, dtype=np.float64), 1e-12))
        return {
            "value/loss": told["value/loss"],
            "value/clip_fraction": told["value/clip_fraction"],
            "value/grad_norm": told["grad_norm"],
            "value/grad_norm/max": told["grad_norm/max"],
            "value/learning_rate": told["learning_rate"],
            "value/mean": float(values.mean(dtype=np.float64)),
            "value/explained_variance": 1 - left,
        }

    def _backward(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        from .losses import Totals, joined, value_loss
        from .scoring_model import align

        totals, parts = Totals(sum(len(s.tokens) for s in samples), len(samples), 0), []
        for rows, counts in self._ranks.batches([s.length for s in samples], self._stage.micro_batch_tokens):
            batch = align([samples[i] for i in rows], self._ranks.device, counts=counts)
            if batch.values_BK is None or batch.returns_BK is None:
                raise ValueError("the critic learns from samples that have values and returns")
            loss, metrics = value_loss(
                self._model(batch), batch.values_BK, batch.returns_BK, batch.mask_BK, self._config.clip, totals
            )
            loss.backward()
            parts.append(metrics)
        return joined(self._ranks.gathered(joined(parts)))

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state as safetensors, beside what is done from now on."""
        self._learner.save(folder)

    def written(self, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come. Raises `RunFailed` where nothing could be written."""
        return self._learner.written(wait=wait)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `RunFailed` when it is of another set of weights."""
        self._learner.load(folder)


class CriticActor:
    """The Ray shell of a rank of a `Critic`."""

    def __init__(self, spec: PolicySpec, seat: Seat | None = None) -> None:
        self._critic = Critic(spec, seat)

    def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Values `[T]` of each completion."""
        return self._critic.values(samples)

    def update(self, samples: Sequence[TrainSample], step: int) -> dict[str, float]:
        """The updates of a step."""
        return self._critic.update(samples, step)

    def save(self, folder: Path) -> None:
        """Begin to write the training state into a folder on the run's storage."""
        self._critic.save(folder)

    def written(self, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come."""
        return self._critic.written(wait)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self._critic.load(folder)
