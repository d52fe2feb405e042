"""Whole runs of a recipe in the test session's Ray, and what they left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from raylign.cluster.rundir import RunDir
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe


def start(
    config: Any, storage: Path, act: Callable[[RunDir, int], None] | None = None
) -> tuple[RunDir, dict[str, Any]]:
    """A run to its end; `act(run, done)` happens when a step's metrics are written, before the next step begins."""
    run = open_run(config, storage, named=True, resume=True)
    if act:
        record = run.metrics

        def record_and_act(stage: str, step: int, values: dict[str, float]) -> None:
            record(stage, step, values)
            act(run, step + 1)

        run.metrics = record_and_act
    return run, run_recipe(config, run, read_inputs(config, run.path), lambda _: None)


def samples(run: RunDir) -> list[tuple[Any, ...]]:
    """All that was sampled, without who did it."""
    columns = ["step", "group", "sample", "completion", "logprobs", "spans", "reward", "version", "digest"]
    paths = sorted((run / "samples").glob("*/step-*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [tuple(str(row[c]) for c in columns) for row in rows]
