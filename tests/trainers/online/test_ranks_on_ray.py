"""A policy of two ranks on real Ray: what a user sees of it, and the death of a rank in the middle of an update."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylign.cluster.rundir import RunDir
from raylign.trainers.recipe import load_recipe

from .runs import start
from .test_failures import meanwhile, pid_of, until


def test_the_death_of_a_rank_in_an_update_changes_nothing(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    """Rank 1 is stopped before the update and killed in it, while rank 0 waits for it in a collective."""
    options = {"kl": "null", "steps": 2, "policy": "{ranks: 2, cpus: 0.5}", "rollout__timeout_seconds": 60}
    options |= {"rewards": "[{type: function, path: 'rewards.py:held'}]", "micro_batch_tokens": 200}
    fields = {f"stages__0__{key}": value for key, value in options.items()}
    seen: list[dict[str, int]] = []

    def look(run: RunDir, done: int) -> None:
        seen.append(run.status()["workers"])

    calm, undisturbed = start(load_recipe(tiny_grpo("calm", **fields)), tmp_path, look)
    assert undisturbed["status"] == "succeeded"
    assert [workers["policy"] for workers in seen] == [2, 2]

    recipe, run, waits = load_recipe(tiny_grpo("torn", **fields)), RunDir(tmp_path / "torn"), []

    def hold(_: RunDir, done: int) -> None:
        if done == 1:
            (tmp_path / "hold").touch()

    def waiting(what: str) -> list[dict[str, Any]]:
        return [wait for wait in run.status().get("waiting", []) if wait["what"].startswith(what)]

    def stop_and_kill() -> None:
        until("step 1 is held", lambda: bool(waiting("the reward of step 1")))
        victim = pid_of("torn/grpo/policy-1")
        os.kill(victim, signal.SIGSTOP)
        (tmp_path / "hold").unlink()
        until("the update has begun", lambda: len(waiting("the update of step 1")) == 2)
        waits.extend(waiting("the update of step 1"))
        os.kill(victim, signal.SIGKILL)

    with meanwhile(stop_and_kill):
        _, disturbed = start(recipe, tmp_path, hold)
    assert sorted(wait["actor"] for wait in waits) == ["torn/grpo/policy-0", "torn/grpo/policy-1"]
    (lost,) = run.events("role_lost")
    assert lost["roles"] == ["policy-0", "policy-1"]
    assert lost["reason"].startswith("policy-1 was lost during")
    assert disturbed["status"] == "succeeded"
    assert disturbed["restarts"] == 1
    assert disturbed["weights"] == undisturbed["weights"]
    assert [m["reward/mean"] for m in run.all_metrics()] == [m["reward/mean"] for m in calm.all_metrics()]
