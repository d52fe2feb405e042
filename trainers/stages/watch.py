"""How an online stage is watched: held-out prompts, an early end, alarms. Imports neither ray nor torch."""

from typing import Literal

from pydantic import Field, model_validator

from ...cluster.config import Config
from .base import DataConfig

AlarmName = Literal[
    "entropy_collapse", "kl_blow_up", "repetition", "overfitting", "nothing_learned", "no_variance", "truncation"
]
"""What `trainers/online/alarms.py` looks for."""


class EarlyStop(Config):
    """End a stage when a number measured on the held-out prompts no longer gets better."""

    metric: str = "held_out/reward"
    mode: Literal["max", "min"] = "max"
    patience: int = Field(default=3, ge=1)
    """So many measurements in a row without a better one than before them end the stage."""
    least: float = Field(default=0.0, ge=0)
    """By how much a measurement must be better to count."""

    @model_validator(mode="after")
    def _is_measured(self) -> "EarlyStop":
        if not self.metric.startswith("held_out/"):
            raise ValueError(f"metric {self.metric!r} is not measured on held-out prompts: take held_out/reward")
        return self


class HeldOutConfig(DataConfig):
    """Prompts that are not trained on: the policy answers them before the first step, after every so many, and after
    the last. The stage's own rewards score the answers; one with weight 0 is there for them alone."""

    every: int = Field(default=10, ge=1)
    """Steps."""
    samples: int = Field(default=1, ge=1)
    """Answers to each prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    right: str | None = None
    """The reward whose 1.0 means a right answer, for `accuracy` and `pass@k`; the stage's first by default."""
    early_stop: EarlyStop | None = None

    @model_validator(mode="after")
    def _answers_differ(self) -> "HeldOutConfig":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples {self.samples} at temperature 0 are all the same answer: take samples 1, or a temperature"
            )
        return self


class AlarmsConfig(Config):
    """Alarms say what they saw and what to try: in `events.jsonl`, in `raylign status`, and in the summary."""

    window: int = Field(default=5, ge=2)
    """Steps over which metrics are averaged before they are compared."""
    ignore: list[AlarmName] = Field(default_factory=list)
    stop: list[AlarmName] = Field(default_factory=list)
    """Those that end the run instead of only being told."""
