"""The blocks of an online stage: what its loss, rewards and critic are made of. Imports neither ray nor torch."""

from typing import Literal

from pydantic import Field, model_validator

from ...cluster.config import Config
from ...rollout.config import RewardModelSource
from .learners import LearnerResources

Estimator = Literal["k1", "k2", "k3"]
"""Of a KL on the policy's own samples (Schulman 2020)."""
Ratio = Literal["token", "sequence", "product"]
Aggregation = Literal["token", "sequence", "constant"]
Scale = Literal["none", "batch", "group", "tokens"]


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
