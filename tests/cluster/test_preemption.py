"""A job's node is drained: the run checkpoints and stops, goes on in another cluster, and stops at its deadline."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raylign.cluster.local import LocalCluster, down, up
from raylign.cluster.rundir import RunDir

from .commands import free_port, raylign, wait_until


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_drained_run_goes_on_in_another_cluster_until_its_time_is_over(
    home: Path, tiny_model: Path, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    model = os.path.relpath(tiny_model, tmp_path)
    recipe = tiny_grpo("moved", model__path=model, stages__0__steps=5000, stages__0__kl="null")
    run = RunDir(home / "runs" / "moved")
    first = up(2, cpus_per_node=2, port=free_port(), name="first")
    try:
        raylign("submit", recipe, "--address", first.jobs_url, home=home)
        wait_until("it trains", lambda: len(run.all_metrics()) > 2, run)
        refused = raylign("resume", "moved", "--address", first.jobs_url, home=home, code=2)
        assert "is running already" in refused.stderr
        _drain(first, _node_of(first, "moved/grpo/policy-0"))
        wait_until("it has stopped", lambda: run.status()["status"] == "stopped", run)
    finally:
        down("first")
    assert run.summary()["reason"].startswith("node 127.0.0.")
    assert "is going away, and " in run.summary()["reason"]
    saved = run.status()["step"]
    assert saved > 2

    second = up(1, cpus_per_node=4, port=free_port(), name="second")
    try:
        told = raylign(
            *("resume", "moved", "--address", second.jobs_url, "--max-hours", "0.01", "--json"), home=home
        ).stdout
        assert json.loads(told)["new"] is True
        wait_until("it has gone on", lambda: run.all_metrics()[-1]["step"] > saved, run)
        assert [e["step"] for e in run.events("resumed")] == [saved]
        wait_until("its time is over", lambda: run.status()["status"] == "stopped", run)
        assert run.summary()["reason"] == (
            f"its time is over (max_hours): `raylign resume moved --storage {home / 'runs'}` goes on"
        )
        assert "moved: stopped" in raylign("logs", "moved", "-f", home=home, code=1).stderr
    finally:
        down("second")


def _node_of(cluster: LocalCluster, actor: str) -> str:
    """The id of an actor's node, as Ray's own command tells it."""
    listed = _ray(cluster, "list", "actors", "--format", "json", "--detail", "--limit", "1000")
    return next(a["node_id"] for a in json.loads(listed) if a["name"] == actor)


def _drain(cluster: LocalCluster, node: str) -> None:
    why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back")
    _ray(cluster, "drain-node", "--node-id", node, *why, "--deadline-remaining-seconds", "600")


def _ray(cluster: LocalCluster, *arguments: str) -> str:
    address = cluster.address if arguments[0] == "drain-node" else cluster.jobs_url
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
