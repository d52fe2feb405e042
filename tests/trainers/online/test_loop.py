"""The online loop on real Ray: the same result for any number of workers, deaths and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from raylign.cluster.rundir import RunDir
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe


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
    columns = ["step", "group", "sample", "completion", "logprobs", "reward", "digest"]
    rows = [row for path in sorted((run / "samples/grpo").iterdir()) for row in pq.read_table(path).to_pylist()]
    return [tuple(str(row[c]) for c in columns) for row in rows]


def test_workers_deaths_scaling_and_a_resume_leave_the_result_as_it_is(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    import ray

    alone, summary = start(load_recipe(tiny_grpo("alone")), tmp_path)
    assert summary["status"] == "succeeded"
    assert summary["weights"]["version"] == 4
    assert summary["workers"] == {"min": 1, "max": 1}
    rewards = [m["reward/mean"] for m in alone.all_metrics()]
    assert len(rewards) == 4
    assert all(m["mismatch/max"] < 1e-3 for m in alone.all_metrics())
    assert all(m["kl"] > 0 for m in alone.all_metrics()[1:])

    config = load_recipe(tiny_grpo("troubled", stages__0__rollout__workers__start=2))

    def trouble(run: RunDir, done: int) -> None:
        """After step 1 a worker dies and the run is scaled up; after step 2 it is stopped (then the test resumes)."""
        if done == 1:
            ray.kill(ray.get_actor("troubled/grpo/rollout-0"))
            run.desire(rollout=3)
        if done == 2:
            run.desire(stop=True)

    run, stopped = start(config, tmp_path, trouble)
    assert stopped["status"] == "stopped"
    assert run.status()["step"] == 2
    assert run.events("worker_lost")
    assert [(e["before"], e["after"]) for e in run.events("scaled")] == [(2, 3)]
    run.desire(stop=False, rollout=1)
    _, summary_b = start(config, tmp_path)
    assert summary_b["status"] == "succeeded"
    assert summary_b["weights"] == summary["weights"]
    assert samples(run) == samples(alone)
