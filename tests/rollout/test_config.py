"""What the rollout part of a recipe refuses by itself."""

from typing import Any

import pytest
from pydantic import ValidationError
from raylign.rollout.config import RolloutConfig
from raylign.trainers.stages import OnlineStage

NCCL: dict[str, Any] = {"weights": {"transport": "nccl"}, "workers": 2, "resources": {"gpus": 1}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"workers": {"min": 1, "max": 4}},
            "needs a fixed fleet and workers are 1 to 4: write workers: 4, or take obj",
        ),
        ({"resources": {"gpus": 0}}, "needs a GPU in every worker and resources.gpus is 0: write 1, or take obj"),
    ],
)
def test_a_broadcast_needs_a_fixed_fleet_of_gpus(change: dict[str, Any], reason: str) -> None:
    assert RolloutConfig.model_validate(NCCL).weights.on_loss == "object_store"
    with pytest.raises(ValidationError, match=f"weights.transport nccl {reason}"):
        RolloutConfig.model_validate(NCCL | change)


def test_a_broadcast_needs_a_gpu_for_the_policy_too() -> None:
    stage = {"data": {"path": "none"}, "rewards": [{"type": "format", "pattern": "x"}], "rollout": NCCL}
    with pytest.raises(ValidationError, match=r"nccl needs a GPU for the policy and policy.gpus is 0: write 1"):
        OnlineStage.model_validate(stage)
    assert OnlineStage.model_validate(stage | {"policy": {"gpus": 1}}).rollout.weights.transport == "nccl"
