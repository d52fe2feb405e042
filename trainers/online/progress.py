"""What a step of the online loop leaves to the next besides weights, so that a resume is exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cluster.errors import RunFailed
from ...rollout.records import Group
from ..stages import AdaptiveKl, OnlineStage
from .checkpoints import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of the controller; a checkpoint has it, and a step that is not finished has not changed it."""

    drawn: int = 0
    """Prompts drawn so far: with dynamic sampling, steps draw unlike numbers."""
    kl_coefficient: float = 0.0
    carried: tuple[Group, ...] = ()
    """Groups whose completions the next step goes on with."""

    @classmethod
    def at_start(cls, stage: OnlineStage) -> "Progress":
        """Before the first step."""
        return cls(kl_coefficient=stage.kl.coefficient if stage.kl else 0.0)

    @property
    def numbers(self) -> dict[str, float]:
        """What a checkpoint's state has of it; the carried groups are a file of their own."""
        return {"drawn": self.drawn, "kl_coefficient": self.kl_coefficient}

    @classmethod
    def of(cls, checkpoint: Checkpoint, carried: Sequence[Group] = ()) -> "Progress":
        """As a checkpoint has it, with the groups it carries. Raises `RunFailed` for one of before there was any."""
        if "progress" not in checkpoint.state:
            raise RunFailed(
                f"checkpoint {checkpoint.path} does not say how many prompts were drawn: an older raylign wrote it; "
                "begin another run with --name"
            )
        return cls(**checkpoint.state["progress"], carried=tuple(carried))

    def after(
        self, drawn: int, groups: Sequence[Group], stage: OnlineStage, carried: Sequence[Group] = ()
    ) -> "Progress":
        """After a step that drew so many prompts, trained on these groups, with the reference's log-probs, and left
        others to the next."""
        coefficient = self.kl_coefficient
        if stage.kl and stage.kl.adaptive and (measured := completion_kl(groups)) is not None:
            coefficient = adapted(coefficient, measured, stage.batch_size, stage.kl.adaptive)
        return Progress(drawn=self.drawn + drawn, kl_coefficient=coefficient, carried=tuple(carried))


def adapted(coefficient: float, measured: float, samples: int, rule: AdaptiveKl) -> float:
    """The next coefficient: β (1 + e · samples / horizon), e = measured / target − 1 within ±0.2 (1909.08593)."""
    error = min(max(measured / rule.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / rule.horizon)


def completion_kl(groups: Sequence[Group]) -> float | None:
    """Mean over completions of Σ log π_engine − log π_ref, nats: KL(policy ‖ reference); none without references."""
    known = [s for g in groups for s in g.samples if s.reference is not None]
    if not known:
        return None
    return math.fsum(float(np.sum(s.logprobs - s.reference, dtype=np.float64)) for s in known) / len(known)
