"""A policy of two ranks on real Ray: what a user sees of it, and the death of a rank in the middle of an update."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.recipe import load_recipe

from .runs import start
from .test_failures import pid_of, until


@pytest.mark.slow
def test_the_death_of_a_rank_in_an_update_changes_nothing(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    """Rank 1 is stopped before the update and killed in it, while rank 0 waits for it in a collective."""
    options: dict[str, Any] = {"kl": "null", "steps": 2, "policy": "{ranks: 2, cpus: 0.5}", "micro_batch_tokens": 200}
    options["rewards"] = '[{type: function, path: "rewards.py:held"}]'
    fields = {f"stages__0__{key}": value for key, value in options.items()}
    counted: list[int] = []
    calm, undisturbed = start(
        load_recipe(tiny_grpo("calm", **fields)),
        tmp_path,
        lambda run, _: counted.append(run.status()["workers"]["policy"]),
    )
    assert undisturbed["status"] == "succeeded"
    assert counted == [2, 2]

    waits: list[dict[str, Any]] = []
    hold = tmp_path / "hold"

    def kill_in_the_update(run: RunDir) -> None:
        def waited_for(what: str) -> list[dict[str, Any]]:
            return [wait for wait in run.status().get("waiting", []) if wait["what"].startswith(what)]

        until("the second step is scored", lambda: bool(waited_for("the reward of step 1")))
        os.kill(victim := pid_of("torn/grpo/policy-1"), signal.SIGSTOP)
        hold.unlink()
        until("both are waited for", lambda: len(waited_for("the update of step 1")) == 2)
        waits.extend(waited_for("the update of step 1"))
        os.kill(victim, signal.SIGKILL)

    def act(run: RunDir, done: int) -> None:
        if done == 1 and not run.events("role_lost"):
            hold.touch()
            threading.Thread(target=kill_in_the_update, args=(run,), daemon=True).start()

    torn, disturbed = start(load_recipe(tiny_grpo("torn", **fields)), tmp_path, act)
    assert sorted(wait["actor"] for wait in waits) == ["torn/grpo/policy-0", "torn/grpo/policy-1"]
    (lost,) = torn.events("role_lost")
    assert lost["roles"] == ["policy-0", "policy-1"]
    assert lost["reason"].startswith("policy-1 was lost during")
    assert disturbed["status"] == "succeeded"
    assert disturbed["restarts"] == 1
    assert disturbed["weights"] == undisturbed["weights"]
    assert [m["reward/mean"] for m in torn.all_metrics()] == [m["reward/mean"] for m in calm.all_metrics()]
