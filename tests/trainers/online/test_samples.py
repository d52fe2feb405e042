"""The parquet of a step has the same columns whatever its first sample lacks."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from raylign.rollout.records import Group, Sample
from raylign.trainers.online.samples import write_samples


def group(index: int, parts: dict[str, float], error: str = "") -> Group:
    sample = Sample(
        tokens=np.array([5, 6], np.int32),
        logprobs=np.array([-0.5, -1.5], np.float32),
        text="ab",
        finish_reason="stop",
        reward=sum(parts.values()),
        reward_parts=parts,
    )
    row = {"prompt": [{"role": "user", "content": "say ab"}]}
    return Group(step=3, index=index, prompt=np.array([1], np.int32), row=row, samples=(sample,), error=error)


def test_a_first_group_without_rewards_costs_the_others_nothing(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 3, [group(0, {}, error="the reward raised"), group(1, {"exact": 1.0})])
    assert path.name == "step-000003.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [r["reward/exact"] for r in rows] == [None, 1.0]
    assert [r["error"] for r in rows] == ["the reward raised", ""]
    assert rows[1]["tokens"] == [5, 6]
    assert rows[1]["logprobs"] == [-0.5, -1.5]
