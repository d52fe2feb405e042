"""The policy and reference roles: plain classes around a model, and their Ray shells."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster.imports import importing
from ...cluster.process_group import Seat
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
from .batch import TrainSample, trained
from .checkpoints import Written


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
    """The model that learns: one rank of it; GPU, or a CPU with as many threads as it reserves whole cores.

    What its methods do, all ranks do together.

    It computes as the engine does, without dropout anywhere: its log-probs are those of the distribution that was
    sampled from, and an update depends on its samples alone, so a resume needs no state of a random generator.
    """

    def __init__(self, spec: PolicySpec, seat: Seat | None = None) -> None:
        with importing():
            import torch

            from ..adapters import Exporter, open_model
            from .learner import Learner
            from .ranks import Ranks
            from .scoring_model import packing_for

        torch.set_num_threads(max(1, int(spec.stage.policy.cpus)))
        self._spec = spec
        self._ranks = Ranks(device_of(spec.stage.policy.gpus), seat)
        model = open_model(spec.base, spec.adapter, spec.stage.adapter, seed=spec.seed, dtype=spec.dtype).eval()
        self._exporter = Exporter(model)
        self._packing = packing_for(model, spec.stage.micro_batch_tokens)
        self._model = self._ranks.spread(model, spec.stage.policy)
        self._parameters = dict(self._model.named_parameters())
        rate = spec.stage.learning_rate
        self._learner = Learner("policy", self._parameters, spec.stage, spec.seed, peak=rate, ranks=self._ranks)

    @property
    def leads(self) -> bool:
        """Whether it is this rank that publishes."""
        return self._ranks.leads

    def update(self, samples: Sequence[TrainSample], step: int, kl_coefficient: float) -> dict[str, float]:
        """The updates of a step. Where no sample moves anything nothing changes. Raises `RunFailed` on a NaN gradient.

        The coefficient is that of a KL in the loss, which may change from step to step. Metrics are means over the
        completion tokens that all updates computed; `updated` says whether the weights moved.
        """
        if not trained(samples, self._spec.stage):
            return {"updated": 0.0}
        if self._spec.stage.keeps_old:
            samples = self._with_old(samples)
        return self._learner.learn(samples, step, partial(self._backward, kl_coefficient=kl_coefficient))

    def _with_old(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """The samples with their log-probs under the weights as they are, before the step's first update; those that
        move nothing stay without."""
        from .scoring_model import logprobs_of

        stage = self._spec.stage
        temperature = stage.rollout.sampling.temperature
        moving = {id(sample) for sample in trained(samples, stage)}
        rows = [row for sample in samples if id(sample) in moving for row in sample.rows]
        old = iter(logprobs_of(self._model, rows, temperature, self._packing, self._ranks))

        def noted(sample: TrainSample) -> TrainSample:
            own = next(old)
            return replace(sample, old=own, rejected=noted(sample.rejected) if sample.rejected else None)

        return [noted(sample) if id(sample) in moving else sample for sample in samples]

    def _backward(self, samples: Sequence[TrainSample], *, kl_coefficient: float) -> tuple[int, dict[str, float]]:
        from .losses import LossSettings, Tokens, Totals, joined, policy_loss, preference_loss
        from .scoring_model import align, completion_logprobs

        stage = self._spec.stage
        temperature, longest = stage.rollout.sampling.temperature, stage.rollout.sampling.max_tokens
        loss_of = partial(preference_loss, beta=stage.beta)
        if stage.loss != "preference":
            loss_of = partial(policy_loss, settings=LossSettings.of(stage, kl_coefficient))
        constant = stage.batch_size // stage.minibatches * longest
        moving = trained(samples, stage)
        whole, computed = (sum(row.count for s in some for row in s.rows) for some in (samples, moving))
        totals = Totals(whole, len(samples), constant, computed)
        parts = []
        for bundles, counts in self._ranks.batches(moving, self._packing):
            batch = align(bundles, self._ranks.device, counts=counts)
            logprobs_BT, entropy_BT = completion_logprobs(
                self._model, batch, temperature, entropy_gradient=stage.entropy_bonus > 0
            )
            tokens = Tokens(
                logprobs_BT=logprobs_BT,
                # of a step's only update, the policy before it is the policy itself
                old_BT=logprobs_BT.detach() if batch.old_BT is None else batch.old_BT,
                behaviour_BT=batch.behaviour_BT,
                advantages_BT=batch.advantages_BT,
                mask_BT=batch.mask_BT,
                reference_BT=batch.old_BT if stage.demonstrations else batch.reference_BT,
                entropy_BT=entropy_BT,
            )
            loss, metrics = loss_of(tokens, totals)
            loss.backward()
            parts.append(metrics)
        return computed, joined(self._ranks.gathered(joined(parts)))

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion without the adapter: of the policy as it was before it learned."""
        from peft import PeftModel

        from .scoring_model import logprobs_of

        stage = self._spec.stage
        temperature = stage.rollout.sampling.temperature
        assert isinstance(self._model, PeftModel), "the stage asks for it with an adapter only"
        with self._model.disable_adapter():
            return logprobs_of(self._model, samples, temperature, self._packing, self._ranks)

    def export(self) -> tuple[Tensors, dict[str, Any]]:
        """What rollouts need: adapter tensors and PEFT config, or all tensors and `{}`; no tensors but on rank 0.

        On a CPU and with one rank the tensors are views of the weights, good until the next update.
        """
        from ..adapters import arrays

        return arrays(self._ranks.led(self._exporter.named(self._parameters))), self._exporter.config

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state as safetensors, beside what is done from now on."""
        self._learner.save(folder)

    def written(self, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come. Raises `RunFailed` where nothing could be written."""
        return self._learner.written(wait=wait)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `RunFailed` when it is of another set of weights."""
        self._learner.load(folder)


class Reference:
    """The policy as it stood when the stage began; gives log-probs and never learns."""

    def __init__(self, spec: PolicySpec) -> None:
        with importing():
            import torch

            from ..adapters import open_model
            from .ranks import Ranks
            from .scoring_model import packing_for

        own = spec.stage.reference_role
        assert own, "a stage without a reference of its own starts none"
        torch.set_num_threads(max(1, int(own.cpus)))
        self._spec = spec
        self._ranks = Ranks(device_of(own.gpus))
        model = open_model(spec.base, spec.adapter, spec.stage.adapter, seed=spec.seed, dtype=spec.dtype).eval()
        self._packing = packing_for(model, spec.stage.micro_batch_tokens)
        self._model: Any = model
        self._model.to(self._ranks.device)

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion under the reference."""
        from .scoring_model import logprobs_of

        stage = self._spec.stage
        temperature = stage.rollout.sampling.temperature
        return logprobs_of(self._model, samples, temperature, self._packing, self._ranks)


def device_of(gpus: float) -> str:
    """Where a role with so many GPUs computes."""
    import torch

    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def peak_gigabytes() -> float:
    """The most memory this process has used so far: of its GPU where it computes on one, else of the machine."""
    import resource

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PolicyActor:
    """The Ray shell of a rank of a `Policy`: publishes what it has learned."""

    def __init__(self, spec: PolicySpec, seat: Seat | None = None) -> None:
        self._policy, self._base = Policy(spec, seat), spec.base_digest
        stage = spec.stage
        self._timeout = stage.timeout_seconds
        self._transport = open_transport(stage.rollout.weights, timeout=self._timeout)
        self._hashing = ThreadPoolExecutor(1, "digest")

    def update(self, samples: Sequence[TrainSample], step: int, kl_coefficient: float) -> dict[str, float]:
        """One optimizer step."""
        return self._policy.update(samples, step, kl_coefficient) | {"memory/policy_gb": peak_gigabytes()}

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion without the adapter."""
        return self._policy.reference_logprobs(samples)

    def publish(self, version: int, workers: Sequence[str]) -> WeightVersion | None:
        """Make the weights as they are now available to these workers, and to any that come later; rank 0 does."""
        tensors, config = self._policy.export()
        return self._send(version, workers, tensors, config) if self._policy.leads else None

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
        """Begin to write the training state into a folder on the run's storage."""
        self._policy.save(folder)

    def written(self, wait: bool = False) -> Written | None:
        """What came of the last `save`; none before it has come."""
        return self._policy.written(wait)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self._policy.load(folder)


class ReferenceActor:
    """The Ray shell of a `Reference`."""

    def __init__(self, spec: PolicySpec) -> None:
        self._reference = Reference(spec)

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs `[T]` of each completion under the reference."""
        return self._reference.logprobs(samples)
