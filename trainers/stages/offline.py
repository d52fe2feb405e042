"""The stages that run on Ray Train. Imports neither ray nor torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ...cluster.config import Resources
from .base import DataConfig, LoraConfig, StageBase


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

    @model_validator(mode="after")
    def _base_is_whole(self) -> "TrainStage":
        adapter = getattr(self, "adapter", None)
        if adapter and adapter.quantize:
            raise ValueError(
                f"adapter.quantize {adapter.quantize}: stages on Ray Train compute with the base in float32; leave it "
                "out, online stages have it"
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


class RewardModelStage(TrainStage):
    """A reward model on pairs: one number read off the last token, which later stages reward with by the stage's name.

    It starts from the policy's weights and leaves the policy as it is. The loss is −log σ(chosen − rejected) (Bradley
    and Terry 1952; InstructGPT 2203.02155), the learning rates are those of TRL: 1e-5 where all weights train, 1e-4
    with an adapter.
    """

    type: Literal["reward_model"] = "reward_model"
    adapter: LoraConfig | None = None
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
        if self.adapter and self.adapter.path:
            raise ValueError(
                f"adapter.path {self.adapter.path!r}: a reward model's adapter is new, as its head is; leave path out"
            )
        return self
