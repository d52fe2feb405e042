"""The plan of a recipe: every role of every stage with its memory, and each stage's steps, tokens, disk and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...rollout.config import ModelReward
from ..config import RunConfig, stage_name
from ..stages import CptStage, OnlineStage, StageConfig, TrainStage
from .footprint import Footprint, Lora, footprint
from .memory import ERROR_BAND, Items, engine, learner, reader

_MOMENTS_AND_WEIGHTS = 12
"""Bytes a trained parameter has in a checkpoint: float32 weight and AdamW's two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """One role of a stage: so many devices with these items each."""

    role: str
    devices: int
    each: Items
    gpus: float
    """What each reserves of a GPU; 0 computes on a CPU."""
    learns: bool = False

    def facts(self) -> dict[str, Any]:
        """As JSON, in GB."""
        return {
            "role": self.role,
            "devices": self.devices,
            "device": "gpu" if self.gpus else "cpu",
            "per_device_gb": round(self.each.total / 1e9, 3),
            "items": self.each.gigabytes(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage needs."""

    stage: str
    type: str
    roles: tuple[RolePlan, ...]
    parameters: int
    trained: int
    steps: int | None
    """None where it is one pass over data that a plan does not read."""
    tokens: int | None
    """The most that the stage can compute: every row as long as it may be."""
    disk: float
    """Bytes of the checkpoints and of what the stage leaves."""
    flops: float | None
    assumes: tuple[str, ...] = ()

    @property
    def trainer(self) -> RolePlan:
        """The role whose weights the stage is about."""
        return next(role for role in self.roles if role.learns)

    def facts(self, flops_per_second: float | None = None) -> dict[str, Any]:
        """As JSON: `total_gb` is the trained model's state on all its devices together, without activations."""
        largest = max(self.roles, key=lambda role: role.each.total)
        unsure = largest.each.activations + largest.each.logits
        low, high = (largest.each.total + (factor - 1) * unsure for factor in ERROR_BAND)
        trainer = self.trainer
        return {
            "stage": self.stage,
            "type": self.type,
            "total_gb": round(trainer.devices * trainer.each.state / 1e9, 3),
            "per_device_gb": round(largest.each.total / 1e9, 3),
            "per_device_gb_band": [round(low / 1e9, 3), round(high / 1e9, 3)],
            "items": trainer.each.gigabytes(),
            "roles": [role.facts() for role in self.roles],
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "steps": self.steps,
            "tokens": self.tokens,
            "disk_gb": round(self.disk / 1e9, 3),
            "seconds": round(self.flops / flops_per_second) if self.flops and flops_per_second else None,
            "assumes": list(self.assumes),
        }


def plan_stages(config: RunConfig, folder: Path) -> list[StagePlan]:
    """Plan every stage of a recipe whose model's config.json lies in `folder`. Raises `InputError`."""
    made, inherited = [], None
    for stage in config.stages:
        own = _low_rank(getattr(stage, "adapter", None))
        adapter = own or (None if isinstance(stage, CptStage) else inherited)
        if isinstance(stage, OnlineStage):
            made.append(_online(config, stage, adapter, folder))
        else:
            made.append(_offline(config, stage, adapter, folder))
        if stage.type != "reward_model":
            inherited = adapter
    return made


def _offline(config: RunConfig, stage: Any, adapter: Any, folder: Path) -> StagePlan:
    share = stage.batch_size // stage.workers.min  # of few workers each has most
    rows = stage.micro_batch_size or share
    pairs = stage.type not in ("cpt", "sft", "kto", "distill")
    forward = rows * (2 if pairs else 1)
    quantized = bool(getattr(adapter, "quantize", None))
    # beside packed weights a stage on Ray Train keeps float32, whatever the recipe's dtype
    dtype = "float32" if quantized else config.model.dtype
    full = stage.type == "cpt"
    device = "cuda" if stage.resources.gpus else "cpu"
    model = _measured(folder, dtype, _lora(adapter), forward, stage.max_length, "full" if full else "none", device)
    tokens = forward * stage.max_length
    each = learner(
        model,
        dtype,
        adapter=adapter is not None,
        quantized=quantized,
        tokens=tokens,
        logits="full" if full else "tiles",
        device="gpu" if stage.resources.gpus else "cpu",
    )
    roles = [RolePlan(role="train", devices=stage.workers.max, each=each, gpus=stage.resources.gpus, learns=True)]
    if stage.type in ("dpo", "kto") and adapter is None:
        frozen = reader(model, dtype, adapter=False, tokens=tokens)
        roles.append(RolePlan(role="reference", devices=stage.workers.max, each=frozen, gpus=stage.resources.gpus))
    return _stage_plan(
        stage,
        roles,
        model,
        adapter is not None,
        tokens=stage.batch_size * stage.max_length * (2 if pairs else 1),
        assumes=_float32_only(config, stage),
    )


def _online(config: RunConfig, stage: OnlineStage, adapter: Any, folder: Path) -> StagePlan:
    dtype = config.model.dtype if adapter else "float32"
    quantized = bool(getattr(adapter, "quantize", None))
    length = stage.rollout.max_prompt_tokens + stage.rollout.sampling.max_tokens
    tokens = min(max(stage.micro_batch_tokens, length), stage.batch_size * length)
    device = "cuda" if stage.policy.gpus else "cpu"
    model = _measured(folder, dtype, _lora(adapter), max(1, tokens // length), length, "none", device)

    def learning(resources: Any) -> Items:
        return learner(
            model,
            dtype,
            adapter=adapter is not None,
            quantized=quantized,
            tokens=tokens,
            logits="chunk",
            checkpointing=resources.activation_checkpointing,
            shards=resources.ranks if resources.shard else 1,
        )

    def role(name: str, devices: int, each: Items, gpus: float, learns: bool = False) -> RolePlan:
        return RolePlan(role=name, devices=devices, each=each, gpus=gpus, learns=learns)

    frozen = reader(model, dtype, quantized=quantized, adapter=adapter is not None, tokens=tokens)
    rollout = stage.rollout
    sampling = engine(model, dtype, adapter=adapter is not None, rows=rollout.slots + 1, length=length)
    roles = [role("policy", stage.policy.ranks, learning(stage.policy), stage.policy.gpus, True)]
    if stage.critic:
        own = stage.critic.resources
        roles.append(role("critic", own.ranks, learning(own), own.gpus))
    if stage.reference_role:
        roles.append(role("reference", 1, frozen, stage.reference_role.gpus))
    scorers = sum(isinstance(reward, ModelReward) for reward in stage.rewards)
    if scorers:
        each = reader(model, "float32", adapter=False, tokens=tokens, logits=False)
        roles.append(role("reward", stage.scoring.workers.max * scorers, each, stage.scoring.resources.gpus))
    roles.append(role("rollout", rollout.workers.max, sampling, rollout.resources.gpus))
    return _stage_plan(stage, roles, model, adapter is not None, tokens=stage.batch_size * length)


def _float32_only(config: RunConfig, stage: TrainStage) -> tuple[str, ...]:
    if config.model.dtype == "float32":
        return ()
    return (
        f"stages on Ray Train compute in float32: `raylign run` refuses model.dtype {config.model.dtype} for "
        f"{stage_name(stage)}; this is what it would need",  # type: ignore[arg-type]
    )


def _stage_plan(
    stage: StageConfig,
    roles: Sequence[RolePlan],
    model: Footprint,
    adapter: bool,
    *,
    tokens: int,
    assumes: tuple[str, ...] = (),
) -> StagePlan:
    """`tokens` are those of one step at most."""
    all_tokens = stage.steps * tokens if stage.steps else None
    passes = 4 if adapter else 6  # a forward is 2 a parameter and token; a frozen one has no gradient of its own
    finished = model.trained * 4
    return StagePlan(
        stage=stage_name(stage),
        type=stage.type,
        roles=tuple(roles),
        parameters=model.parameters,
        trained=model.trained,
        steps=stage.steps,
        tokens=all_tokens,
        disk=stage.keep_last * model.trained * _MOMENTS_AND_WEIGHTS + finished,
        flops=all_tokens * passes * model.parameters / roles[0].devices if all_tokens else None,
        assumes=assumes,
    )


def _low_rank(adapter: Any) -> Any:
    """The adapter, if it has a rank; what trains in another way is planned as if all weights did, which is more."""
    return adapter if hasattr(adapter, "r") else None


def _lora(adapter: Any) -> Lora | None:
    if adapter is None:
        return None
    targets = adapter.targets
    return Lora(r=adapter.r, targets=targets if isinstance(targets, str) else tuple(targets))


@lru_cache(maxsize=32)
def _measured(folder: Path, dtype: str, lora: Lora | None, rows: int, tokens: int, head: Any, device: str) -> Footprint:
    """Stages of one recipe are often alike, and a model of 80 layers takes seconds."""
    return footprint(folder, dtype=dtype, lora=lora, rows=rows, tokens=tokens, head=head, device=device)
