"""The stages that sample while they learn, as separate actors. Imports neither ray nor torch."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ...cluster.config import RoleResources
from ...rollout.config import RewardConfig, RolloutConfig, ScoringConfig
from .adapters import LoraConfig
from .algorithms import ALGORITHMS, AdvantageName, AlgorithmName, LossName
from .base import StageBase
from .blocks import (
    Aggregation,
    ClipConfig,
    CriticConfig,
    DynamicSampling,
    KeepBest,
    KlConfig,
    MismatchConfig,
    OverlongConfig,
    Ratio,
    Scale,
)
from .learners import LearnerResources
from .sense import refuse_nonsense
from .watch import AlarmsConfig, HeldOutConfig


class OnlineStage(StageBase):
    """Reinforcement learning with separate policy, reference, critic, reward and rollout actors.

    `type` names an algorithm of `ALGORITHMS`, which sets the defaults of the fields from `advantage` on; each may be
    overridden. The trainer's log-probs are those of `rollout.sampling.temperature` alone, which must be above 0; what
    would make the engine draw from another distribution (top-p, top-k, greedy, dropout) is refused.
    """

    type: AlgorithmName = "grpo"
    adapter: LoraConfig | None = None
    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=2)
    """Completions per step: prompts times `rollout.group_size`."""
    learning_rate: float = Field(default=1e-5, gt=0)
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field(default_factory=list)
    """Their weighted sum is what is learned; with a `rollout.environment`, on top of what that gives."""
    scoring: ScoringConfig = ScoringConfig()
    advantage: AdvantageName = "group_mean"
    """Reward − its group's mean, reward − the mean of the others of its group (RLOO), the returns of each token as they
    are (REINFORCE++), what a critic did not expect (PPO's GAE), or none where the loss is of pairs."""
    advantage_scale: Scale = "batch"
    """What divides it: nothing (Dr.GRPO), the batch's std (LitePPO), the group's (GRPO); `tokens` takes off the mean
    over all tokens of the batch and divides by their std (REINFORCE++)."""
    loss: LossName = "clipped"
    """The policy objective: PPO's clipped surrogate, CISPO (2506.13585), or DPO's of pairs (`preference`)."""
    ratio: Ratio = "token"
    """The probability ratio that is clipped: each token's, the geometric mean over the completion (GSPO), or the
    whole completion's (RLOO)."""
    aggregation: Aggregation = "token"
    """Mean over all tokens of the step (DAPO), mean of the means of completions (GRPO), or the sum divided by
    batch_size · max_tokens (Dr.GRPO)."""
    clip: ClipConfig = ClipConfig()
    kl: KlConfig | None = None
    mismatch: MismatchConfig | None = MismatchConfig()
    """Correction for the engine's arithmetic; none switches it off. The mismatch is logged in any case."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Coefficient of the mean entropy that is taken off the loss."""
    beta: float = Field(default=0.1, gt=0)
    """Of the loss `preference`: what a nat of log-ratio to the reference is worth."""
    demonstrations: bool = False
    """Pairs are the data's own answer before each completion (SPIN), instead of a group's best before its worst. Their
    reference is the policy as the step began, which made the completions; rewards are watched only."""
    mask_truncated: bool = False
    """Leave completions that were cut at `max_tokens` out of the update; their rewards count in their groups' means."""
    dynamic_sampling: DynamicSampling | None = None
    overlong: OverlongConfig | None = None
    critic: CriticConfig | None = None
    epochs: int = Field(default=1, ge=1)
    """How often a step's completions are trained on."""
    minibatches: int = Field(default=1, ge=1)
    """Parts into which each epoch cuts them, with an update each; from the second update on, ratios differ from 1."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward and backward of a policy's rank."""
    staleness: int = Field(default=0, ge=0)
    """How many versions older than the policy the weights are that a step's completions come from, so that generation
    goes on during updates: step t comes from version max(0, t − staleness), always. `mismatch` corrects the update for
    it: its ratio is that of the policy before the step to the weights that drew (AReaL's decoupled objective,
    2505.24298)."""
    partial_tokens: int | None = Field(default=None, ge=1)
    """Partial rollouts (Kimi k1.5, 2501.12599; APRIL, 2509.18521): a completion gets at most so many tokens a step; one
    that is not finished then is carried to the next step and goes on under its weights. A step draws its prompts
    besides what it goes on with, and trains on all groups that are finished in it. None: a step waits for all."""
    keep_best: KeepBest | None = None
    held_out: HeldOutConfig | None = None
    alarms: AlarmsConfig = AlarmsConfig()
    policy: LearnerResources = LearnerResources()
    reference: RoleResources | Literal["adapter_off"] = RoleResources(cpus=0.5)
    """An actor of its own with a second copy of the model, or `adapter_off`: the policy itself without its adapter,
    which is what it was when the stage began."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """How long one call of a role may take (update, reference, score of a group, publish, checkpoint) before its actor
    counts as lost; `rollout.timeout_seconds` is for one group's generation."""
    max_failures: int = Field(default=2, ge=0)
    """How often, without a finished step in between, lost roles (policy, reference, rewards) are started anew."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """What the algorithm presets and the recipe leaves open."""
        algorithm = ALGORITHMS.get(given.get("type", "grpo")) if isinstance(given, dict) else None
        if algorithm is None:
            return given
        merged = dict(given)
        for path, value in {"advantage": algorithm.advantage, "loss": algorithm.loss, **algorithm.defaults}.items():
            name, _, key = path.partition(".")
            block = merged.get(name, {} if cls.model_fields[name].default else None)
            if not key:
                merged.setdefault(name, value)
            elif isinstance(block, dict):
                merged[name] = {key: value, **block}
        return merged

    @model_validator(mode="after")
    def _makes_sense(self) -> "OnlineStage":
        refuse_nonsense(self)
        return self

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference role; the one of demonstrations is the policy itself."""
        return self.kl is not None or (self.loss == "preference" and not self.demonstrations)

    @property
    def reference_role(self) -> RoleResources | None:
        """What an actor for the reference reserves, where there is one."""
        return self.reference if self.has_reference and isinstance(self.reference, RoleResources) else None

    @property
    def roles(self) -> dict[str, tuple[int, RoleResources]]:
        """How many actors each role has at the start and what each reserves, in the order in which they get places."""
        return {
            "policy": (self.policy.ranks, self.policy),
            **({"critic": (self.critic.resources.ranks, self.critic.resources)} if self.critic else {}),
            **({"reference": (1, self.reference_role)} if self.reference_role else {}),
            "reward": (self.scoring.workers.start, self.scoring.resources),
            "rollout": (self.rollout.workers.start, self.rollout.resources),
        }

    @property
    def oldest(self) -> int:
        """How many versions older than the policy the weights of a step's oldest tokens can be."""
        longest = self.rollout.sampling.max_tokens
        return self.staleness + math.ceil(longest / (self.partial_tokens or longest)) - 1

    @property
    def keeps_old(self) -> bool:
        """Whether an update needs the log-probs that the policy gave before the step's first."""
        return self.updates_per_step > 1 or self.demonstrations

    @property
    def prompts_per_step(self) -> int:
        """Groups of a step."""
        return self.batch_size // self.rollout.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on the completions of one step."""
        return self.epochs * self.minibatches

    @property
    def overlong_buffer(self) -> int:
        """How many of the last tokens before `max_tokens` are punished, where they are."""
        given = self.overlong.buffer if self.overlong else None
        return given or max(1, self.rollout.sampling.max_tokens // 5)
