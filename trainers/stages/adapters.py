"""What of a model a stage trains: `adapter: {type: …}`. Imports neither ray nor torch.

What the engines can add to each token's own forward (`PER_ROW`) stays an adapter to the end and is served beside
others. What they cannot, but which is a change of weights, is merged into a new base when the stage ends. Virtual
tokens are no change of weights: they stay a PEFT folder, which no later stage and no service of ours can use.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...cluster.config import Config


class _LowRank(Config):
    """What all low-rank adapters have: W + (alpha / r) B A with B = 0 at the start."""

    r: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / r; 2r by default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for modules whose name ends so or matches: `{q_proj: 32}`."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that train whole beside the adapter, such as `[lm_head]`."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen base in 4 bits (QLoRA 2305.14314, double quantisation); needs `raylign[qlora]`. The adapter is
    for the base as it is: in online stages rollouts sample from that, the metrics `mismatch/…` show the difference, and
    the stage's `mismatch` corrects it."""


class LoraConfig(_LowRank):
    """Low-rank adapters (2106.09685): r 16, alpha 2r, all linear layers, B starts at zero."""

    type: Literal["lora"] = "lora"
    path: str | None = None
    """Start from this adapter folder instead of a new one."""


class RsLoraConfig(_LowRank):
    """Rank-stabilised LoRA (2312.03732): the scale is alpha / √r."""

    type: Literal["rslora"] = "rslora"


class DoraConfig(_LowRank):
    """Weight-decomposed LoRA (2402.09353): each column's length is learned beside the low-rank direction."""

    type: Literal["dora"] = "dora"


class LoraPlusConfig(_LowRank):
    """LoRA+ (2402.12354): B learns faster than A."""

    type: Literal["lora_plus"] = "lora_plus"
    ratio: float = Field(default=16.0, ge=1)
    """Learning rate of B over that of A, which is the stage's."""


class PissaConfig(_LowRank):
    """PiSSA (2404.02948): the adapter starts as the weights' principal directions, which leave the base.

    What it leaves is an ordinary LoRA of twice the rank on the base as it was.
    """

    type: Literal["pissa"] = "pissa"

    @model_validator(mode="after")
    def _base_is_whole(self) -> "PissaConfig":
        if self.quantize:
            raise ValueError(
                f"quantize {self.quantize}: pissa takes principal directions out of the base, which 4 bits have "
                "rounded; take lora, or leave quantize out"
            )
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("pissa ends as a LoRA of twice the rank, one for all modules: leave the patterns out")
        return self


class AdaLoraConfig(Config):
    """AdaLoRA (2303.10512): ranks shrink from `initial_r` to `r` on average, where they matter least."""

    type: Literal["adalora"] = "adalora"
    r: int = Field(default=8, ge=1)
    initial_r: int | None = Field(default=None, ge=1)
    """1.5 r by default."""
    alpha: float | None = Field(default=None, gt=0)
    """2r by default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """The part of the steps before ranks begin to shrink."""
    final: float = Field(default=0.3, ge=0, lt=1)
    """The part of the steps after they have stopped to."""

    @model_validator(mode="after")
    def _shrinks(self) -> "AdaLoraConfig":
        if self.initial_r is not None and self.initial_r < self.r:
            raise ValueError(f"initial_r {self.initial_r} is below r {self.r}: ranks only shrink")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup:g} and final {self.final:g} leave no steps to shrink ranks in")
        return self


class Ia3Config(Config):
    """(IA)³ (2205.05638): a learned factor for every key, value and inner activation of the feed-forward layers."""

    type: Literal["ia3"] = "ia3"
    targets: list[str] | None = None
    """PEFT's choice for the architecture by default."""
    feedforward: list[str] | None = None
    """Those of the targets whose inputs are scaled, not their outputs; PEFT's choice by default."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Ia3Config":
        if (self.targets is None) != (self.feedforward is None):
            raise ValueError("targets and feedforward are given together, or neither")
        return self


class PromptTuningConfig(Config):
    """Prompt tuning (2104.08691): embeddings of virtual tokens before the row."""

    type: Literal["prompt"] = "prompt"
    tokens: int = Field(default=20, ge=1)
    text: str | None = None
    """Start from the embeddings of this text, repeated or cut to `tokens`; else from random tokens."""


class PrefixTuningConfig(Config):
    """Virtual keys and values in every layer: P-tuning v2 (2110.07602), with `project` prefix tuning (2101.00190)."""

    type: Literal["prefix"] = "prefix"
    tokens: int = Field(default=20, ge=1)
    project: bool = False
    """Learn them through a two-layer network."""


class PTuningConfig(Config):
    """P-tuning (2103.10385): virtual tokens whose embeddings a small network makes."""

    type: Literal["p_tuning"] = "p_tuning"
    tokens: int = Field(default=20, ge=1)
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = Field(default=128, ge=1)
    """Width of that network."""


class GaloreConfig(Config):
    """GaLore (2403.03507): all weights train, Adam's moments in a subspace of rank `r` of each matrix's gradient."""

    type: Literal["galore"] = "galore"
    r: int = Field(default=128, ge=1)
    update_every: int = Field(default=200, ge=1)
    """Optimizer steps between new subspaces."""
    scale: float = Field(default=0.25, gt=0)
    """Of the update of projected matrices."""


class FullConfig(Config):
    """All weights. A former stage's adapter is merged first; without an `adapter` block that would train on instead."""

    type: Literal["full"] = "full"


PER_ROW = (LoraConfig, RsLoraConfig, LoraPlusConfig, PissaConfig)
VIRTUAL = (PromptTuningConfig, PrefixTuningConfig, PTuningConfig)
ALL_WEIGHTS = (GaloreConfig, FullConfig)

AnyAdapter = (
    LoraConfig
    | RsLoraConfig
    | DoraConfig
    | LoraPlusConfig
    | PissaConfig
    | AdaLoraConfig
    | Ia3Config
    | PromptTuningConfig
    | PrefixTuningConfig
    | PTuningConfig
    | GaloreConfig
    | FullConfig
)


def _default_type(given: Any) -> Any:
    """`{r: 8}` means a LoRA."""
    return {"type": "lora", **given} if isinstance(given, dict) else given


AdapterConfig = Annotated[Annotated[AnyAdapter, Field(discriminator="type")], BeforeValidator(_default_type)]


def served_per_row(adapter: AnyAdapter) -> bool:
    """Whether our engines can add it to single rows of a batch, so that it stays an adapter when its stage ends."""
    return isinstance(adapter, PER_ROW) and not (adapter.modules_to_save or adapter.alpha_pattern)


def virtual(adapter: AnyAdapter | None) -> bool:
    """Whether it is virtual tokens, which cannot be merged into weights."""
    return isinstance(adapter, VIRTUAL)


def trains_all(adapter: AnyAdapter | None) -> bool:
    """Whether all weights train, so that there is no adapter."""
    return adapter is None or isinstance(adapter, ALL_WEIGHTS)
