"""How a finished reward model orders pairs. Pulls in torch: workers and tests import it."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...rollout.rewards.model import RewardModel

if TYPE_CHECKING:
    import pyarrow as pa


def measure(folder: Path, pairs: "pa.Table", device: str = "cpu") -> dict[str, float]:
    """`accuracy`, the part of pairs whose chosen answer scores higher, and `margin`, by how much on average.

    Scored from the folder, as a later stage does it. `pairs` has columns of token lists: `prompt_ids`, `chosen_ids`,
    `rejected_ids`.
    """
    model = RewardModel(folder, device)
    sides = [
        [np.array(row["prompt_ids"] + row[side], np.int64) for row in pairs.to_pylist()]
        for side in ("chosen_ids", "rejected_ids")
    ]
    scores = np.array(model.scores(sides[0] + sides[1])).reshape(2, -1)
    return {"accuracy": float((scores[0] > scores[1]).mean()), "margin": float((scores[0] - scores[1]).mean())}
