"""The online loop on real Ray: the same result for any number of workers, deaths and resumes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from raylign.cluster.rundir import RunDir
from raylign.trainers.inputs import read_inputs
from raylign.trainers.launch import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe


def start(config: Any, storage: Path) -> tuple[RunDir, dict[str, Any]]:
    run = open_run(config, storage, named=True, resume=True)
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
    run = RunDir(tmp_path / "troubled")
    killed = threading.Event()

    def trouble(step: int) -> None:
        """Kill a worker in step 1, scale up in step 2, stop in step 3 (then the test resumes)."""
        if step == 1 and not killed.is_set():
            killed.set()
            ray.kill(ray.get_actor("troubled/grpo/rollout-0"))
            run.desire(rollout=3)
        if step == 2:
            run.desire(stop=True)

    watcher = Watcher(run, trouble)
    _, stopped = start(config, tmp_path)
    watcher.end()
    assert stopped["status"] == "stopped"
    assert run.events("worker_lost")
    run.desire(stop=False, rollout=1)
    _, summary_b = start(config, tmp_path)
    assert summary_b["status"] == "succeeded"
    assert summary_b["weights"] == summary["weights"]
    assert samples(run) == samples(alone)


class Watcher:
    """Calls `act(step)` whenever a line of metrics shows that a step is done."""

    def __init__(self, run: RunDir, act: Callable[[int], None]) -> None:
        self._run, self._act, self._done = run, act, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        seen = 0
        while not self._done.wait(0.02):
            finished = len(self._run.all_metrics())
            for step in range(seen + 1, finished + 1):
                self._act(step)
            seen = finished

    def end(self) -> None:
        self._done.set()
        self._thread.join()
