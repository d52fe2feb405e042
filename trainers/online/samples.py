"""The samples of a step as a parquet file: what was asked, what came, what it was worth, which weights made it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...rollout.records import Group


def write_samples(folder: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write `folder/step-000012.parquet`, a row a sample, in ledger order; a part that a sample lacks is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.parquet"
    parts = sorted({name for group in groups for sample in group.samples for name in sample.reward_parts})
    schema = pa.schema({**_columns(), **{f"reward/{name}": pa.float64() for name in parts}})
    rows = [
        {
            "step": step,
            "group": group.index,
            "sample": i,
            "prompt": group.row["prompt"][-1]["content"],
            "completion": sample.text,
            "tokens": sample.tokens.tolist(),
            "logprobs": sample.logprobs.tolist(),
            "reward": sample.reward,
            "transcript": sample.transcript or None,
            "turns": sample.turns,
            "finish_reason": sample.finish_reason,
            "version": group.version,
            "digest": group.digest,
            "spans": [span._asdict() for span in sample.spans],
            "error": group.error,
            **{f"reward/{name}": value for name, value in sample.reward_parts.items()},
        }
        for group in groups
        for i, sample in enumerate(group.samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def _columns() -> dict[str, Any]:
    """What every sample has, by name; parquet's types, since a row may be empty or lack a value."""
    import pyarrow as pa

    return {
        "step": pa.int64(),
        "group": pa.int64(),
        "sample": pa.int64(),
        "prompt": pa.string(),
        "completion": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "reward": pa.float64(),
        "transcript": pa.string(),
        "turns": pa.int32(),
        "finish_reason": pa.string(),
        "version": pa.int64(),
        "digest": pa.string(),
        "spans": pa.list_(pa.struct({"tokens": pa.int64(), "version": pa.int64(), "digest": pa.string()})),
        "error": pa.string(),
    }
