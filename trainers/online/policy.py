"""The policy and reference roles: plain classes around a model, and their Ray shells."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster.weights import (
    Tensors,
    WeightVersion,
    joined,
    keep_version,
    kept_version,
    open_transport,
    version_digest,
)
from ..stages import OnlineStage
from .batch import TrainSample, micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What a policy or reference is built from: a base folder, the adapter it goes on from, and the stage."""

    base: Path
    base_digest: str
    adapter: Path | None
    stage: OnlineStage
    seed: int
    dtype: str


class Policy:
    """The model that learns. One rank; CPU or GPU.

    It computes as the engine does, without dropout anywhere: its log-probs are those of the distribution that was
    sampled from, and an update depends on its samples alone, so a resume needs no state of a random generator.
    """

    def __init__(self, spec: PolicySpec) -> None:
        import torch
        from torch import nn

        from ..adapters import Exporter, open_model
        from .learner import Learner

        torch.set_num_threads(1)
        self._spec = spec
        self._device = device_of(spec.stage.policy.gpus)
        model = open_model(spec.base, spec.adapter, spec.stage.adapter, seed=spec.seed, dtype=spec.dtype)
        self._model: nn.Module = nn.Module.to(model, self._device).eval()
        self._exporter = Exporter(self._model)
        self._learner = Learner(
            "policy",
            dict(self._model.named_parameters()),
            spec.stage,
            spec.seed,
            peak=spec.stage.learning_rate,
            device=self._device,
        )

    def update(self, samples: Sequence[TrainSample], step: int, kl_coefficient: float) -> dict[str, float]:
        """The updates of a step. Without samples nothing changes. Raises `RunFailed` on a NaN gradient.

        The coefficient is that of a KL in the loss, which may change from step to step. Metrics are means over the
        completion tokens of all updates; `updated` says whether the weights moved.
        """
        if not samples:
            return {"updated": 0.0}
        if self._spec.stage.updates_per_step > 1:
            samples = self._with_old(samples)
        return self._learner.learn(samples, step, partial(self._backward, kl_coefficient=kl_coefficient))

    def _with_old(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """The samples with their log-probs under the weights as they are, before the step's first update."""
        from .scoring_model import logprobs_of

        stage = self._spec.stage
        temperature = stage.rollout.sampling.temperature
        old = logprobs_of(self._model, samples, temperature, stage.micro_batch_tokens, self._device)
        return [replace(sample, old=row) for sample, row in zip(samples, old, strict=True)]

    def _backward(self, samples: Sequence[TrainSample], *, kl_coefficient: float) -> dict[str, float]:
        from .losses import LossSettings, Tokens, Totals, joined, policy_loss
        from .scoring_model import align, completion_logprobs

        stage = self._spec.stage
        temperature, longest = stage.rollout.sampling.temperature, stage.rollout.sampling.max_tokens
        settings = LossSettings.of(stage, kl_coefficient)
        constant = stage.batch_size // stage.minibatches * longest
        totals = Totals(sum(len(s.tokens) for s in samples), len(samples), constant)
        parts = []
        for rows in micro_batches([s.length for s in samples], stage.micro_batch_tokens):
            batch = align([samples[i] for i in rows], self._device)
            logprobs_BK, entropy_BK = completion_logprobs(
                self._model, batch, temperature, entropy_gradient=stage.entropy_bonus > 0
            )
            tokens = Tokens(
                logprobs_BT=logprobs_BK,
                # of a step's only update, the policy before it is the policy itself
                old_BT=logprobs_BK.detach() if batch.old_BK is None else batch.old_BK,
                behaviour_BT=batch.behaviour_BK,
                advantages_BT=batch.advantages_BK,
                mask_BT=batch.mask_BK,
                reference_BT=batch.reference_BK,
                entropy_BT=entropy_BK,
            )
            loss, metrics = policy_loss(tokens, totals, settings)
            loss.backward()
            parts.append(metrics)
        return joined(parts)

    def export(self) -> tuple[Tensors, dict[str, Any]]:
        """What rollouts need: adapter tensors and PEFT config, or all tensors and `{}`.

        On a CPU the tensors are views of the weights, good until the next update.
        """
        return self._exporter.tensors(), self._exporter.config

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state as safetensors."""
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `RunFailed` when it is of another set of weights."""
        self._learner.load(folder)


class Reference:
    """The policy as it stood when the stage began; gives log-probs and never learns."""

    def __init__(self, spec: PolicySpec) -> None:
        import torch
        from torch import nn

        from ..adapters import open_model

        torch.set_num_threads(1)
        self._spec = spec
        self._device = device_of(spec.stage.reference.gpus)
        model = open_model(spec.base, spec.adapter, spec.stage.adapter, seed=spec.seed, dtype=spec.dtype)
        self._model: nn.Module = nn.Module.to(model, self._device).eval()

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion under the reference."""
        from .scoring_model import logprobs_of

        stage = self._spec.stage
        return logprobs_of(
            self._model, samples, stage.rollout.sampling.temperature, stage.micro_batch_tokens, self._device
        )


def device_of(gpus: float) -> str:
    """Where a role with so many GPUs computes."""
    import torch

    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


class PolicyActor:
    """The Ray shell of a `Policy`: publishes what it has learned."""

    def __init__(self, spec: PolicySpec) -> None:
        self._policy, self._base = Policy(spec), spec.base_digest
        stage = spec.stage
        self._timeout = stage.timeout_seconds
        self._transport = open_transport(stage.rollout.weights, timeout=self._timeout)
        self._hashing = ThreadPoolExecutor(1, "digest")

    def update(self, samples: Sequence[TrainSample], step: int, kl_coefficient: float) -> dict[str, float]:
        """One optimizer step."""
        return self._policy.update(samples, step, kl_coefficient)

    def publish(self, version: int, workers: Sequence[str]) -> WeightVersion:
        """Make the weights as they are now available to these workers, and to any that come later."""
        return self._send(version, workers, *self._policy.export())

    def publish_kept(self, version: int, folder: Path) -> WeightVersion:
        """Make a version available again that a checkpoint has kept."""
        return self._send(version, (), *kept_version(folder, version))

    def keep(self, folder: Path, versions: Sequence[WeightVersion]) -> None:
        """Write versions that were published before into a checkpoint. Raises `RunFailed` where it cannot."""
        for weights in versions:
            pieces = self._transport.receive(replace(weights.parcel, channel=None), "the policy", timeout=self._timeout)
            keep_version(folder, weights.version, pieces, weights.config)

    def _send(self, version: int, workers: Sequence[str], tensors: Tensors, config: dict[str, Any]) -> WeightVersion:
        pieces = joined(tensors)
        digest = self._hashing.submit(version_digest, pieces, config, self._base)  # beside the copying
        parcel = self._transport.send(pieces, workers)
        return WeightVersion(version=version, digest=digest.result(), parcel=parcel, config=config, base=self._base)

    def save(self, folder: Path) -> None:
        """Write the training state into a folder on the run's storage. Raises `RunFailed` where it cannot."""
        self._policy.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self._policy.load(folder)


class ReferenceActor:
    """The Ray shell of a `Reference`."""

    def __init__(self, spec: PolicySpec) -> None:
        self._reference = Reference(spec)

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion under the reference."""
        return self._reference.logprobs(samples)
