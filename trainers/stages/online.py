"""The stages that sample while they learn, as separate actors. Imports neither ray nor torch."""

from typing import Literal

from pydantic import Field, model_validator

from ...cluster.config import Config, Resources
from ...rollout.config import RewardConfig, RolloutConfig, ScoringConfig
from .base import LoraConfig, StageBase


class KlConfig(Config):
    """A penalty on the distance to the reference; without this block there is none and no reference is loaded."""

    coefficient: float = Field(default=0.01, gt=0)
    estimator: Literal["k1", "k2", "k3"] = "k3"


class ClipConfig(Config):
    """Bounds of the probability ratio (DAPO 2503.14476) and the dual clip for negative advantages."""

    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.28, gt=0)
    dual: float | None = Field(default=3.0, gt=1)


class OnlineStage(StageBase):
    """Group-relative policy optimization (2402.03300) with separate policy, reference, reward and rollout actors.

    The trainer's log-probs are those of `rollout.sampling.temperature` alone, which must be above 0; what would make
    the engine draw from another distribution (top-p, top-k, greedy, dropout) is refused.
    """

    type: Literal["grpo"] = "grpo"
    adapter: LoraConfig | None = None
    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=2)
    """Completions per step: prompts times `rollout.group_size`."""
    learning_rate: float = Field(default=1e-5, gt=0)
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field(min_length=1)
    scoring: ScoringConfig = ScoringConfig()
    kl: KlConfig | None = None
    loss: Literal["grpo", "cispo"] = "grpo"
    """The policy objective: clipped surrogate, or CISPO (2506.13585)."""
    clip: ClipConfig = ClipConfig()
    advantage_scale: Literal["none", "batch", "group"] = "batch"
    """What divides reward − group mean: nothing (Dr.GRPO), the batch's std (LitePPO) or the group's (GRPO)."""
    mismatch_cap: float | None = Field(default=2.0, gt=0)
    """Cap of the token-level truncated importance weights between trainer and engine; none switches them off."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward and backward on the policy."""
    staleness: Literal[0] = 0
    policy: Resources = Resources()
    reference: Resources = Resources(cpus=0.5)
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """How long one call of a role may take (update, reference, score of a group, publish, checkpoint) before its actor
    counts as lost; `rollout.timeout_seconds` is for one group's generation."""

    @model_validator(mode="after")
    def _whole_groups(self) -> "OnlineStage":
        size = self.rollout.group_size
        if self.batch_size % size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of rollout.group_size {size}: "
                f"take {max(1, self.batch_size // size) * size}"
            )
        return self

    @model_validator(mode="after")
    def _policy_can_broadcast(self) -> "OnlineStage":
        if self.rollout.weights.transport == "nccl" and self.policy.gpus < 1:
            raise ValueError(
                f"rollout.weights.transport nccl needs a GPU for the policy and policy.gpus is {self.policy.gpus:g}: "
                "write 1, or take object_store"
            )
        return self

    @model_validator(mode="after")
    def _trains_on_what_is_sampled(self) -> "OnlineStage":
        sampling, reason = self.rollout.sampling, "the trainer's log-probs are those of the temperature alone"
        if sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature 0: greedy completions of a group are all equal, so there is nothing to "
                "learn from; take 1.0"
            )
        if sampling.top_p < 1:
            raise ValueError(f"rollout.sampling.top_p {sampling.top_p:g}: {reason}; take 1.0")
        if sampling.top_k > 0:
            raise ValueError(f"rollout.sampling.top_k {sampling.top_k}: {reason}; take 0")
        if sampling.min_p > 0:
            raise ValueError(f"rollout.sampling.min_p {sampling.min_p:g}: {reason}; take 0")
        if self.adapter and self.adapter.dropout > 0:
            raise ValueError(
                f"adapter.dropout {self.adapter.dropout:g}: the engine samples without dropout, so the trainer's "
                "log-probs would be of another distribution; take 0"
            )
        return self
