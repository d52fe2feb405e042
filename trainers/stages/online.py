"""The stages that sample while they learn, as separate actors. Imports neither ray nor torch."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ...cluster.config import Config, RoleResources
from ...rollout.config import RewardConfig, RewardModelSource, RolloutConfig, ScoringConfig
from .algorithms import ALGORITHMS, AdvantageName, AlgorithmName, LossName
from .base import LoraConfig, StageBase
from .learners import LearnerResources
from .wishes import refuse_wishes

Estimator = Literal["k1", "k2", "k3"]
"""Of a KL on the policy's own samples (Schulman 2020)."""
Ratio = Literal["token", "sequence", "product"]
Aggregation = Literal["token", "sequence", "constant"]
Scale = Literal["none", "batch", "group", "tokens"]

_MOST_UNCORRECTED = 4
"""Of staleness without a correction for it."""


class AdaptiveKl(Config):
    """A coefficient that follows the measured KL (Ziegler et al. 2019, 1909.08593, section 2.2)."""

    target: float = Field(default=6.0, gt=0)
    """The KL to hold, in nats a completion."""
    horizon: int = Field(default=10_000, ge=1)
    """Completions over which an error of 20 % or more changes the coefficient by 20 %."""


class KlConfig(Config):
    """A penalty on the distance to the reference; without this block there is none and no reference is loaded."""

    coefficient: float = Field(default=0.01, gt=0)
    """Where `adaptive` moves it, the one of the first step."""
    estimator: Estimator = "k3"
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off the reward of every token before advantages are computed."""
    adaptive: AdaptiveKl | None = None

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KlConfig":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 in the loss holds nothing back: on samples of the policy its gradient is 0 on average; "
                "take k3 or k2, or place: reward"
            )
        return self


class ClipConfig(Config):
    """Bounds of the probability ratio (DAPO 2503.14476) and the dual clip for negative advantages."""

    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.28, gt=0)
    dual: float | None = Field(default=3.0, gt=1)


class MismatchConfig(Config):
    """What is done where the trainer's probability of a sampled token differs from the engine's.

    The ratio trainer / engine of each token, or of the whole completion, weighs its loss. `truncate` bounds it
    (truncated importance sampling, Yao et al. 2025); `mask` leaves out what is outside the bounds (IcePop, 2510.18855).
    """

    level: Literal["token", "sequence"] = "token"
    action: Literal["truncate", "mask"] = "truncate"
    low: float | None = Field(default=None, gt=0)
    high: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> "MismatchConfig":
        if self.high < 1 or (self.low or 0) > 1:
            raise ValueError(
                f"bounds {self.low} to {self.high:g} leave out the ratio 1, of a token on which trainer and engine "
                "agree: take low below 1 and high above"
            )
        return self


class DynamicSampling(Config):
    """Groups without variance are replaced by further prompts until the batch is full (DAPO 2503.14476)."""

    limit: int = Field(default=10, ge=2)
    """At most this many times the step's prompts are drawn; then the step trains on the groups it has."""


class OverlongConfig(Config):
    """A soft punishment of completions that come near `max_tokens` (DAPO 2503.14476, section 3.4).

    Nothing up to `max_tokens − buffer`, then linearly down to −`penalty` at `max_tokens`.
    """

    buffer: int | None = Field(default=None, ge=1)
    """Tokens; a fifth of `max_tokens` by default."""
    penalty: float = Field(default=1.0, gt=0)


class KeepBest(Config):
    """Checkpoints that stay, beside the last ones, because a metric was best in the steps that led to them."""

    count: int = Field(default=1, ge=1)
    metric: str = "reward/mean"
    """Any metric of a step; its mean over the steps since the checkpoint before counts."""
    mode: Literal["max", "min"] = "max"


class CriticConfig(RewardModelSource):
    """The critic of PPO: the policy's base with a value head and, as the policy has it, an adapter or all weights.

    With `stage` or `path` it starts as that reward model, body and head (InstructGPT 2203.02155), with a new adapter;
    without, every value starts at 0.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    """Its schedule is the stage's."""
    clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from that before the step without a loss of at least as much (1707.06347)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation (1506.02438): 0 trusts the next value, 1 the reward that came."""
    resources: LearnerResources = LearnerResources()

    @model_validator(mode="after")
    def _has_one_source(self) -> "CriticConfig":
        if self.stage and self.path:
            raise ValueError(f"stage {self.stage!r} and path {self.path!r}: a critic starts from one reward model")
        return self


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
    rewards: list[RewardConfig] = Field(min_length=1)
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
    def _scale_has_groups(self) -> "OnlineStage":
        if self.advantage in ("returns", "gae") and self.advantage_scale in ("group", "batch"):
            raise ValueError(
                f"advantage_scale {self.advantage_scale} is the spread about groups' means, and advantage "
                f"{self.advantage} takes none off: take tokens or none"
            )
        return self

    @model_validator(mode="after")
    def _critic_is_used(self) -> "OnlineStage":
        if self.advantage == "gae" and self.critic is None:
            raise ValueError(
                "critic null: advantage gae is made of a critic's values; give critic: {}, or take returns"
            )
        if self.critic and self.advantage != "gae":
            raise ValueError(
                f"critic: advantage {self.advantage} asks no values, so a critic would learn for nothing; leave it "
                "out, or take advantage gae"
            )
        return self

    @model_validator(mode="after")
    def _preference_is_of_pairs(self) -> "OnlineStage":
        if (self.loss == "preference") != (self.advantage == "none"):
            raise ValueError(
                f"loss {self.loss} with advantage {self.advantage}: the loss of pairs takes none, and every other one "
                "an advantage"
            )
        if self.demonstrations and self.loss != "preference":
            raise ValueError(f"demonstrations: loss {self.loss} does not compare with answers of the data")
        if self.demonstrations and self.dynamic_sampling:
            raise ValueError("dynamic_sampling: pairs with demonstrations need no spread of rewards; leave it out")
        if self.loss != "preference":
            return self
        for name in ("kl", "mismatch", "entropy_bonus"):
            if value := getattr(self, name):
                shown = value if isinstance(value, float) else "a block"
                raise ValueError(f"{name} {shown}: the loss of pairs has no such term; leave it out (beta holds it)")
        return self

    @model_validator(mode="after")
    def _adapter_can_be_off(self) -> "OnlineStage":
        if self.reference == "adapter_off" and (self.adapter is None or self.adapter.path):
            found = "no adapter block" if self.adapter is None else f"the adapter {self.adapter.path}"
            raise ValueError(
                f"reference adapter_off: the stage begins with {found}, so the policy without its adapter is not what "
                "it was when the stage began; give the stage a new adapter (adapter: {}), or leave reference out"
            )
        return self

    @model_validator(mode="after")
    def _updates_make_sense(self) -> "OnlineStage":
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into minibatches of equal size: minibatches is "
                f"{self.minibatches}; take a multiple of {self.minibatches}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_work(self) -> "OnlineStage":
        of_an_update = self.batch_size // self.minibatches
        groups = [
            ("policy", self.policy.ranks),
            ("critic.resources", self.critic.resources.ranks if self.critic else 1),
        ]
        for place, ranks in groups:
            if ranks > of_an_update:
                raise ValueError(
                    f"{place}.ranks {ranks}: an update has {of_an_update} completions (batch_size {self.batch_size} "
                    f"over minibatches {self.minibatches}), so some ranks would have none; take {of_an_update} or less"
                )
        return self

    @model_validator(mode="after")
    def _roles_can_stand_so(self) -> "OnlineStage":
        refuse_wishes(self.roles)
        low, high = self.scoring.workers.min, self.scoring.workers.max
        if low != high and any(r.colocate_with or r.split_from for _, r in self.roles.values()):
            raise ValueError(
                f"scoring.workers {low} to {high}: where roles wish to stand together or apart, places are planned for "
                f"a fixed number of scorers; write workers: {self.scoring.workers.start}, or leave the wishes out"
            )
        return self

    @model_validator(mode="after")
    def _partial_rollouts_are_partial(self) -> "OnlineStage":
        longest = self.rollout.sampling.max_tokens
        if self.partial_tokens and self.partial_tokens >= longest:
            raise ValueError(
                f"partial_tokens {self.partial_tokens}: rollout.sampling.max_tokens is {longest}, so no completion "
                f"would be carried; take less, such as {max(1, longest // 2)}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _staleness_is_borne(self) -> "OnlineStage":
        if self.oldest > _MOST_UNCORRECTED and self.mismatch is None:
            how = f"staleness {self.staleness}"
            if self.partial_tokens:
                how += (
                    f" and partial_tokens {self.partial_tokens} of rollout.sampling.max_tokens, {self.oldest} in all,"
                )
            raise ValueError(
                f"{how} with mismatch null: completions of weights so old mislead an update that "
                f"is not corrected for them (AReaL, 2505.24298); leave mismatch in, or take {_MOST_UNCORRECTED} or less"
            )
        if self.staleness and self.rollout.weights.transport == "nccl":
            raise ValueError(
                f"staleness {self.staleness} with rollout.weights.transport nccl: a broadcast reaches all workers at "
                "once, and here each takes new weights as it gets free; take object_store, or staleness 0"
            )
        return self

    @model_validator(mode="after")
    def _buffer_fits(self) -> "OnlineStage":
        longest = self.rollout.sampling.max_tokens
        if self.overlong and self.overlong_buffer >= longest:
            raise ValueError(
                f"overlong.buffer {self.overlong_buffer} leaves no length unpunished: rollout.sampling.max_tokens is "
                f"{longest}; take less, such as {max(1, longest // 5)}"
            )
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
