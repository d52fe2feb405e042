"""The refusal of a run whose stages need more memory than its nodes have, by the rows that it really trains on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..stages import OnlineStage, StageConfig
from .room import Room, require_room
from .stages import plan_stages

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..data.inputs import Inputs


def require_memory(config: "RunConfig", inputs: "Inputs", rooms: Sequence[Room]) -> None:
    """Raise `DoesNotFit` with the items and the mend where a stage needs more than there is.

    A stage is planned for its longest row, not for the longest that its recipe would let pass.
    """
    stages = [_for_rows(s, given.proof.longest) for s, given in zip(config.stages, inputs.stages, strict=True)]
    require_room(plan_stages(config.model_copy(update={"stages": stages}), inputs.model), rooms)


def _for_rows(stage: StageConfig, longest: int) -> StageConfig:
    """The stage with its limit lowered to its longest row, in tokens."""
    if isinstance(stage, OnlineStage):
        limit = min(stage.rollout.max_prompt_tokens, longest)
        return stage.model_copy(update={"rollout": stage.rollout.model_copy(update={"max_prompt_tokens": limit})})
    return stage.model_copy(update={"max_length": min(stage.max_length, longest)})
