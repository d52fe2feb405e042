"""The online loop on real Ray: the same result for any number of workers, deaths and resumes."""

from collections.abc import Callable
from pathlib import Path

from raylign.cluster.rundir import RunDir
from raylign.trainers.recipe import load_recipe

from .conftest import Train
from .runs import samples, start


def test_workers_deaths_scaling_and_a_resume_leave_the_result_as_it_is(
    tiny_grpo: Callable[..., Path], train_here: Train, ray_session: str, tmp_path: Path
) -> None:
    import ray

    alone = train_here("alone", "grpo", steps=4, kl="{coefficient: 0.01}", reference="adapter_off")
    rewards = [m["reward/mean"] for m in alone.all_metrics()]
    assert len(rewards) == 4
    assert all(m["mismatch/max"] < 1e-3 for m in alone.all_metrics())
    assert all(m["kl"] > 0 for m in alone.all_metrics()[1:])

    config = load_recipe(
        tiny_grpo("troubled", stages__0__rollout__workers__start=2, stages__0__reference="adapter_off")
    )

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
    _, summary = start(config, tmp_path)
    assert summary["status"] == "succeeded"
    assert summary["weights"] == {"version": 4, "digest": alone.events("weights")[-1]["digest"]}
    assert samples(run) == samples(alone)
