"""The stages of a recipe: one frozen config a training method. Imports neither ray nor torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..cluster.config import Config, Name, Resources
from ..rollout.config import RewardConfig, RolloutConfig, ScoringConfig

DataFormat = Literal["auto", "text", "messages", "prompt_completion", "alpaca", "preference", "prompt"]


class DataConfig(Config):
    """Rows of one file, and how to read them.

    `columns` maps the names this toolkit knows (`prompt`, `completion`, `messages`, `chosen`, `rejected`, `text`, …)
    to the file's own.
    """

    path: str
    """A JSONL, JSON, Parquet or text file, relative to the recipe; `prepared://…` is what the recipe's script wrote."""
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    system: str | None = None
    """A system message put before every conversation that has none."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first rows."""


class LoraConfig(Config):
    """Low-rank adapters (2106.09685): r 16, alpha 2r, all linear layers, B starts at zero."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / r; 2r by default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    path: str | None = None
    """Start from this adapter folder instead of a new one."""


class StageBase(Config):
    """What every stage has: data, an optimizer and a length."""

    name: Name | None = None
    """Names the stage in metrics and in what is served; its type by default."""
    data: DataConfig
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; by default one pass over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step over all workers."""
    learning_rate: float = Field(gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    """3 % of the steps by default."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; a tenth of the stage by default. One is always written at the end and on a stop."""
    keep_last: int = Field(default=2, ge=1)
    """How many checkpoints stay; the one before the newest is for a newest that turns out to be damaged."""


class TrainStage(StageBase):
    """What the stages on Ray Train share."""

    workers: int = Field(default=1, ge=1)
    """Data-parallel training workers."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward on one worker; the worker's whole share by default."""
    max_length: int = Field(default=1024, ge=2)
    """Rows with more tokens are refused, never cut silently, unless `truncate` is set."""
    truncate: bool = False
    resources: Resources = Resources()
    max_failures: int = Field(default=2, ge=0)
    """How often Ray Train restarts the workers from the last checkpoint after one died."""

    @model_validator(mode="after")
    def _share(self) -> "TrainStage":
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {self.workers} workers: "
                f"take a multiple of {self.workers}"
            )
        share = self.batch_size // self.workers
        if self.micro_batch_size and share % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide a worker's share of {share} "
                f"(batch_size {self.batch_size} over {self.workers} workers)"
            )
        return self


class CptStage(TrainStage):
    """Continued pre-training (or from random weights) on raw text, all parameters; every token counts."""

    type: Literal["cpt"] = "cpt"
    learning_rate: float = Field(default=1e-5, gt=0)


class SftStage(TrainStage):
    """Supervised fine-tuning; the loss counts the assistant's tokens only."""

    type: Literal["sft"] = "sft"
    adapter: LoraConfig | None = None
    learning_rate: float = Field(default=2e-4, gt=0)


class DpoStage(TrainStage):
    """Direct preference optimization (2305.18290) on pairs; the reference is the policy as the stage began."""

    type: Literal["dpo"] = "dpo"
    adapter: LoraConfig | None = None
    learning_rate: float = Field(default=5e-6, gt=0)
    beta: float = Field(default=0.1, gt=0)


class KlConfig(Config):
    """A penalty on the distance to the reference; without this block there is none and no reference is loaded."""

    coefficient: float = Field(default=0.01, gt=0)
    estimator: Literal["k1", "k2", "k3"] = "k3"


class ClipConfig(Config):
    """Bounds of the probability ratio (DAPO 2503.14476) and the dual clip for negative advantages."""

    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.28, gt=0)
    dual: float | None = Field(default=3.0, gt=1)


class KeepBest(Config):
    """Checkpoints that stay, beside the last ones, because a metric was best in the steps that led to them."""

    count: int = Field(default=1, ge=1)
    metric: str = "reward/mean"
    """Any metric of a step; its mean over the steps since the checkpoint before counts."""
    mode: Literal["max", "min"] = "max"


class GrpoStage(StageBase):
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
    keep_best: KeepBest | None = None
    policy: Resources = Resources()
    reference: Resources = Resources(cpus=0.5)
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """How long one call of a role may take (update, reference, score of a group, publish, checkpoint) before its actor
    counts as lost; `rollout.timeout_seconds` is for one group's generation."""
    max_failures: int = Field(default=2, ge=0)
    """How often, without a finished step in between, lost roles (policy, reference, rewards) are started anew."""

    @model_validator(mode="after")
    def _whole_groups(self) -> "GrpoStage":
        size = self.rollout.group_size
        if self.batch_size % size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of rollout.group_size {size}: "
                f"take {max(1, self.batch_size // size) * size}"
            )
        return self

    @model_validator(mode="after")
    def _policy_can_broadcast(self) -> "GrpoStage":
        if self.rollout.weights.transport == "nccl" and self.policy.gpus < 1:
            raise ValueError(
                f"rollout.weights.transport nccl needs a GPU for the policy and policy.gpus is {self.policy.gpus:g}: "
                "write 1, or take object_store"
            )
        return self

    @model_validator(mode="after")
    def _trains_on_what_is_sampled(self) -> "GrpoStage":
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


StageConfig = Annotated[CptStage | SftStage | DpoStage | GrpoStage, Field(discriminator="type")]
