"""The stages that run on Ray Train. Imports neither ray nor torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ...cluster.config import Config, Resources
from .adapters import AdapterConfig, AnyAdapter, PromptTuningConfig, PTuningConfig, virtual
from .base import DataConfig, StageBase

PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
"""Losses of pairs, as TRL names them."""


class TrainWorkers(Config):
    """How many workers Ray Train has: as many as find places, from `min` to `max`; a number sets both."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _ordered(self) -> "TrainWorkers":
        if self.min > self.max:
            raise ValueError(f"needs min <= max, not {self.min}, {self.max}")
        return self


class TrainStage(StageBase):
    """What the stages on Ray Train share."""

    workers: TrainWorkers = TrainWorkers()
    """Data-parallel training workers."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward on one worker; the worker's whole share by default."""
    max_length: int = Field(default=1024, ge=2)
    """Rows with more tokens are refused, never cut silently, unless `truncate` is set."""
    truncate: bool = False
    resources: Resources = Resources()
    activation_checkpointing: bool = False
    """Keep a layer's input alone and compute the layer again in the backward: a third more work for less memory."""
    max_failures: int = Field(default=2, ge=0)
    """How often Ray Train restarts the workers from the last checkpoint after one died."""

    @model_validator(mode="after")
    def _share(self) -> "TrainStage":
        for workers in range(self.workers.min, self.workers.max + 1):
            if self.batch_size % workers:
                raise ValueError(
                    f"batch_size {self.batch_size} does not divide over {workers} workers: take a multiple of {workers}"
                )
            share = self.batch_size // workers
            if self.micro_batch_size and share % self.micro_batch_size:
                raise ValueError(
                    f"micro_batch_size {self.micro_batch_size} does not divide a worker's share of {share} "
                    f"(batch_size {self.batch_size} over {workers} workers)"
                )
        return self


class PackedStage(TrainStage):
    """What the stages on single rows of tokens share."""

    packing: bool = False
    """Lay the rows of a micro-batch side by side instead of filling them up to the longest. No token sees another row,
    so loss and gradients are the same; the work is that of the tokens there are. On a CPU attention still computes the
    blocks between rows, so it pays where rows differ in length and are short beside the model's width."""

    @model_validator(mode="after")
    def _packs_rows_alone(self) -> "PackedStage":
        adapter: AnyAdapter | None = getattr(self, "adapter", None)
        if self.packing and virtual(adapter):
            raise ValueError(
                f"packing with adapter.type {adapter.type}: virtual tokens stand once before a forward, so only the "  # type: ignore[union-attr]
                "first row would see them; leave packing out"
            )
        return self


class CptStage(PackedStage):
    """Continued pre-training (or from random weights) on raw text; every token counts.

    Without an `adapter` block of its own it trains all weights, a former adapter merged into them.
    """

    type: Literal["cpt"] = "cpt"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=1e-5, gt=0)


class SftStage(PackedStage):
    """Supervised fine-tuning; the loss counts the assistant's tokens only."""

    type: Literal["sft"] = "sft"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=2e-4, gt=0)


class DpoStage(TrainStage):
    """Direct preference optimization (2305.18290) on pairs; the reference is the policy as the stage began."""

    type: Literal["dpo"] = "dpo"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=5e-6, gt=0)
    beta: float = Field(default=0.1, gt=0)
    """How much the distance to the reference counts; of `ipo` its τ."""
    loss: PairLoss = "sigmoid"
    """DPO's own, hinge (SLiC 2305.10425), IPO (2310.12036), robust to flipped labels (2403.00409), EXO (2402.00856),
    NCA (2402.05369), BCO (2404.04656), SPPO (2405.00675), AOT (2406.05882), APO (2408.06266), DiscoPOP (2406.08414), or
    DPO's of means over tokens (`sigmoid_norm`)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The part of pairs whose label is taken to be flipped; `robust` and `exo_pair` need one above 0."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> "DpoStage":
        needs = self.loss in ("robust", "exo_pair")
        if needs and not self.label_smoothing:
            raise ValueError(f"loss {self.loss} needs label_smoothing above 0: 0.1 for robust, 0.001 for exo_pair")
        if self.label_smoothing and not needs and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing {self.label_smoothing:g} has no place in loss {self.loss}: leave it out")
        if self.label_smoothing and self.loss == "sigmoid":
            raise ValueError("label_smoothing with loss sigmoid does nothing: take loss: robust")
        return self


class KtoStage(TrainStage):
    """Kahneman-Tversky optimization (2402.01306) on single answers that are wanted or not (`label`).

    The reference is the policy as the stage began. Its point of comparison, a KL, is estimated over a micro-batch, from
    each prompt with the answer of the row before: so a micro-batch has at least two rows, better more.
    """

    type: Literal["kto"] = "kto"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=5e-6, gt=0)
    beta: float = Field(default=0.1, gt=0)
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """KTO's own, or APO-zero of single answers (2408.06266), which needs no KL."""
    desirable_weight: float = Field(default=1.0, gt=0)
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Where one kind of label is rarer, its weight makes up for it: weight times rows should be about even."""

    @model_validator(mode="after")
    def _compares(self) -> "KtoStage":
        micro = self.micro_batch_size or self.batch_size // self.workers.max
        if self.loss == "kto" and micro < 2:
            raise ValueError(
                f"micro_batch_size {micro}: kto compares the rows of a micro-batch with each other: take 2 or more"
            )
        return self


class OrpoStage(TrainStage):
    """Odds ratio preference optimization (2403.07691) on pairs: fine-tuning on the chosen answer, and its odds against
    the rejected one, without a reference. As in the authors' code, fine-tuning counts the prompt's tokens too."""

    type: Literal["orpo"] = "orpo"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=8e-6, gt=0)
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds beside the fine-tuning; the paper's λ."""

    @model_validator(mode="after")
    def _rows_keep_their_places(self) -> "OrpoStage":
        _refuse_virtual_rows(self.type, self.adapter)
        return self


class SimpoStage(TrainStage):
    """SimPO (2405.14734) on pairs: the mean log-prob of a token is the reward, without a reference."""

    type: Literal["simpo"] = "simpo"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=1e-6, gt=0)
    beta: float = Field(default=2.0, gt=0)
    gamma: float = Field(default=1.0, ge=0)
    """The margin by which the chosen answer's reward should be above the rejected one's."""

    @model_validator(mode="after")
    def _rows_keep_their_places(self) -> "SimpoStage":
        _refuse_virtual_rows(self.type, self.adapter)
        return self


class TeacherConfig(Config):
    """The model that a `distill` stage learns from: a folder with the student's own tokenizer."""

    path: str
    """Relative to the recipe; `prepared://…` is what the recipe's script wrote."""


class DistillStage(PackedStage):
    """Learn a teacher's distribution over every token that the assistant says in the data's conversations.

    The loss is the generalised Jensen-Shannon divergence of GKD (2306.13649), a mean over tokens. For sequence-level
    distillation (1606.07947) an `sft` stage trains on conversations that the teacher has written.
    """

    type: Literal["distill"] = "distill"
    adapter: AdapterConfig | None = None
    learning_rate: float = Field(default=2e-5, gt=0)
    teacher: TeacherConfig
    beta: float = Field(default=0.0, ge=0, le=1)
    """0 is the KL from teacher to student (cover all that the teacher says), 1 the reverse (keep to its mode)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions."""


class RewardModelStage(TrainStage):
    """A reward model on pairs: one number read off the last token, which later stages reward with by the stage's name.

    It starts from the policy's weights and leaves the policy as it is. The loss is −log σ(chosen − rejected) (Bradley
    and Terry 1952; InstructGPT 2203.02155), the learning rates are those of TRL: 1e-5 where all weights train, 1e-4
    with an adapter.
    """

    type: Literal["reward_model"] = "reward_model"
    adapter: AdapterConfig | None = None
    """Trained beside the new head, and merged at the end."""
    learning_rate: float = Field(default=1e-5, gt=0)
    held_out: DataConfig | None = None
    """Pairs that are not trained on; how many the finished model orders right stands in the stage's metrics."""

    @model_validator(mode="before")
    @classmethod
    def _adapter_learns_faster(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("adapter"):
            return {"learning_rate": 1e-4, **given}
        return given

    @model_validator(mode="after")
    def _adapter_is_new(self) -> "RewardModelStage":
        _refuse_what_is_no_folder(self.adapter)
        return self


class ProcessRewardModelStage(TrainStage):
    """A process reward model (2305.20050): whether each step of an answer is right, read off the step's last token.

    Rows are `{"prompt", "completions": [step, …], "labels": [bool, …]}`. A head of two numbers is trained with
    cross-entropy at the last token of every step, which is that of `separator`. It starts from the policy's weights and
    leaves the policy as it is.
    """

    type: Literal["process_reward_model"] = "process_reward_model"
    adapter: AdapterConfig | None = None
    """Trained beside the new head, and merged at the end."""
    learning_rate: float = Field(default=1e-5, gt=0)
    separator: str = Field(default="\n", min_length=1)
    """Ends every step."""

    @model_validator(mode="after")
    def _adapter_is_new(self) -> "ProcessRewardModelStage":
        _refuse_what_is_no_folder(self.adapter)
        return self


def _refuse_what_is_no_folder(adapter: AnyAdapter | None) -> None:
    """A reward model ends as one folder, body and head together."""
    path, quantize = getattr(adapter, "path", None), getattr(adapter, "quantize", None)
    if path:
        raise ValueError(f"adapter.path {path!r}: a reward model's adapter is new, as its head is; leave path out")
    if quantize:
        raise ValueError(
            f"adapter.quantize {quantize}: a reward model's head and adapter belong to the base they were trained on, "
            "and it is merged into one folder; leave it out"
        )
    if adapter and virtual(adapter):
        raise ValueError(
            f"adapter.type {adapter.type}: a reward model is merged into one folder, and virtual tokens are no change "
            "of weights; take lora"
        )


def _refuse_virtual_rows(stage: str, adapter: AnyAdapter | None) -> None:
    """TRL's experimental trainers read log-probs at a row's own positions."""
    if isinstance(adapter, PromptTuningConfig | PTuningConfig):
        raise ValueError(
            f"adapter.type {adapter.type}: its virtual tokens stand before the row, and TRL's {stage} trainer reads "
            "log-probs at the row's own positions; take prefix, or lora"
        )
