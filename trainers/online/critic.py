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

    The head begins at 0, so that before the first update every value is 0 and advantages are those of the rewards. Or
    the critic begins as a reward model, and the value before a token is the score of the text so far.
    """

    def __init__(self, spec: PolicySpec, seat: Seat | None = None) -> None:
        with importing():
            import torch

            from .learner import Learner
            from .ranks import Ranks
            from .scoring_model import packing_for, without_peft
            from .valuer import Valuer

        assert spec.stage.critic, "a stage without a critic starts none"
        self._stage, self._config = spec.stage, spec.stage.critic
        torch.set_num_threads(max(1, int(self._config.resources.cpus)))
        self._ranks = Ranks(device_of(self._config.resources.gpus), seat)
        model, head_D = _opened(spec)
        whole = without_peft(model.eval())
        self._packing = packing_for(model, spec.stage.micro_batch_tokens)
        valuer = Valuer(whole.base_model, whole.config.get_text_config().hidden_size)
        if head_D is not None:
            valuer.head.weight.data[0] = head_D
        self._model = self._ranks.spread(valuer, self._config.resources)
        parameters = dict(self._model.named_parameters())
        rate = self._config.learning_rate
        self._learner = Learner("critic", parameters, spec.stage, spec.seed, peak=rate, ranks=self._ranks)

    def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """What is still to come, as the critic sees it before each completion token; `[T]` of each sample."""
        from .scoring_model import of_each_sample

        return of_each_sample(self._model, samples, self._packing, self._ranks)

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

    def _backward(self, samples: Sequence[TrainSample]) -> tuple[int, dict[str, float]]:
        from .losses import Totals, joined, value_loss
        from .scoring_model import align

        totals, parts = Totals(sum(len(s.tokens) for s in samples), len(samples), 0), []
        for bundles, counts in self._ranks.batches(samples, self._packing):
            batch = align(bundles, self._ranks.device, counts=counts)
            if batch.values_BT is None or batch.returns_BT is None:
                raise ValueError("the critic learns from samples that have values and returns")
            loss, metrics = value_loss(
                self._model(batch), batch.values_BT, batch.returns_BT, batch.mask_BT, self._config.clip, totals
            )
            loss.backward()
            parts.append(metrics)
        return totals.tokens, joined(self._ranks.gathered(joined(parts)))

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state as safetensors, beside what is done from now on."""
        self._learner.save(folder)

    def written(self, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come. Raises `RunFailed` where nothing could be written."""
        return self._learner.written(wait=wait)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `RunFailed` when it is of another set of weights."""
        self._learner.load(folder)


def _opened(spec: PolicySpec) -> tuple[Any, Any]:
    """The model that the critic is made of and the weights `[D]` of its head, or none for zeros.

    A reward model's body has no part of the policy's adapter: it gets a new one of that size.
    """
    from ..adapters import lora_like, open_model, open_scorer

    own, critic = spec.stage.adapter, spec.stage.critic
    if critic is None or critic.path is None:
        return open_model(spec.base, spec.adapter, own, seed=spec.seed, dtype=spec.dtype), None
    lora = lora_like(spec.adapter).model_copy(update={"quantize": own and own.quantize}) if spec.adapter else own
    return open_scorer(Path(critic.path), lora, seed=spec.seed, dtype=spec.dtype)


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
