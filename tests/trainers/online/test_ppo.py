"""PPO on real Ray: the critic has places and processes of its own, learns, and is told of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylign.cluster.rundir import RunDir
from raylign.trainers.pipeline import demands
from raylign.trainers.recipe import load_recipe

from .runs import start


def test_a_critic_has_actors_of_its_own(tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path) -> None:
    import ray

    config = load_recipe(
        tiny_grpo(
            "valued",
            stages__0__type="ppo",
            stages__0__steps=2,
            stages__0__kl="null",
            stages__0__minibatches=2,
            stages__0__critic="{learning_rate: 1e-2, resources: {ranks: 2, cpus: 0.25}}",
        )
    )
    asked = {demand.role: (demand.count, demand.cpus) for demand in demands(config.stages[0])}
    assert asked["critic"] == (2, 0.25)
    seen: list[Any] = []

    def look(run: RunDir, done: int) -> None:
        ray.get_actor("valued/ppo/critic-1")
        seen.append(run.status()["workers"])

    run, summary = start(config, tmp_path, look)
    assert summary["status"] == "succeeded"
    assert all((workers["policy"], workers["critic"]) == (1, 2) for workers in seen)
    first, second = run.all_metrics()
    assert first["updates"] == second["updates"] == 2
    assert second["value/loss"] < first["value/loss"]
    lanes = {(span["lane"], span["what"]) for span in run.events("span")}
    assert ("critic-0", "values") in lanes
