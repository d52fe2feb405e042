"""The samples of a step as a parquet file: what was asked, what came, what it was worth, which weights made it."""

from collections.abc import Sequence
from pathlib import Path

from ..rollout.records import Group


def write_samples(folder: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write `folder/step-000012.parquet`, a row a sample, in ledger order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.parquet"
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
            "finish_reason": sample.finish_reason,
            "version": group.version,
            "digest": group.digest,
            "error": group.error,
            **{f"reward/{name}": value for name, value in sample.reward_parts.items()},
        }
        for group in groups
        for i, sample in enumerate(group.samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
