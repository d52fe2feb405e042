"""A run on three nodes: workers spread, come and go with their nodes, and leave the result as it is.

The cluster lives in a process of its own (this file as a script), so that the Ray of the other tests is left alone.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.multinode
@pytest.mark.slow
def test_nodes_come_and_go_and_the_weights_are_those_of_one_worker(
    tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    held = '{type: function, path: "rewards.py:held", timeout_seconds: 120}'
    for name in ("alone", "spread"):
        sizes = {"stages__0__rollout__slots": 8, "stages__0__rollout__sampling__max_tokens": 100}
        tiny_grpo(name, stages__0__steps=12, stages__0__rewards=f"[{held}]", **sizes)
    seen = play("nodes_come_and_go", tmp_path)

    assert seen["alone"]["status"] == seen["spread"]["status"] == "succeeded"
    assert seen["spread"]["weights"] == seen["alone"]["weights"]
    assert seen["alone"]["workers"] == {"min": 1, "max": 1}
    assert seen["spread"]["workers"] == {"min": 1, "max": 3}
    assert seen["spread"]["restarts"] == 1
    assert [seen["lost"]] == [e["worker"] for e in seen["events"] if e["kind"] == "worker_lost"]

    roles = {name.removeprefix("spread/grpo/"): node for name, node in seen["actors"].items()}
    assert {name.partition("-")[0] for name in roles} == {"policy", "reference", "reward", "rollout"}
    rollouts = [node for name, node in roles.items() if name.startswith("rollout-")]
    assert len(rollouts) == len(set(rollouts)) == 3


@pytest.mark.multinode
@pytest.mark.slow
def test_roles_stand_together_and_apart_also_after_their_node_is_lost(
    tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    tiny_grpo(
        "split",
        stages__0__steps=3,
        stages__0__kl="null",
        stages__0__scoring="{resources: {cpus: 0.5, colocate_with: policy}}",
        stages__0__rollout__resources="{split_from: policy}",
        stages__0__rewards='[{type: function, path: "rewards.py:held", timeout_seconds: 120}]',
    )
    seen = play("a_node_of_wishes_is_lost", tmp_path)
    assert seen["before"] == {"policy": "small", "reward": "small", "rollout": "large"}
    assert seen["after"] == {"policy": "large", "reward": "large", "rollout": "late"}
    assert (seen["summary"]["status"], seen["steps"]) == ("succeeded", [0, 1, 2])
    assert {"policy-0"} <= set(seen["lost"]) <= {"policy-0", "reward-0"}


def play(scenario: str, folder: Path) -> dict[str, Any]:
    """What a scenario of this file saw in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), scenario, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return json.loads((folder / "seen.json").read_text())


# ---- what runs in the process of its own


def a_node_of_wishes_is_lost(folder: Path) -> dict[str, Any]:
    """The policy goes where its scorers fit beside it, moves when that node is lost, and the worker makes way."""
    from raylign.cluster.rundir import RunDir

    run, hold, names = RunDir(folder / "split"), folder / "hold", {}

    def standing() -> dict[str, str]:
        return {
            name.rpartition("/")[2].partition("-")[0]: names.get(node, "gone")
            for name, node in named_actors("split/").items()
        }

    with cluster_of(0) as (cluster, hosts):
        small = cluster.add_node(num_cpus=2, **hosts[0])
        large = cluster.add_node(num_cpus=3, **hosts[1])
        names |= {small.node_id: "small", large.node_id: "large"}
        hold.touch()
        running = start(folder, "split")
        until("a worker works", running, lambda: len(standing()) == 3 and workers(run) == 1)
        before = standing()
        cluster.remove_node(small, allow_graceful=False)
        until("the policy has moved", running, lambda: standing().get("policy") == "large")
        until("the worker makes way", running, lambda: "rollout" not in standing())
        names[cluster.add_node(num_cpus=1, **hosts[2]).node_id] = "late"
        until("all are back", running, lambda: len(standing()) == 3 and workers(run) == 1)
        after = standing()
        hold.unlink()
        summary = running.end()
    steps = [m["step"] for m in run.all_metrics()]
    lost = [role for event in run.events("role_lost") for role in event["roles"]]
    return {"before": before, "after": after, "summary": summary, "steps": steps, "lost": lost}


@contextmanager
def cluster_of(cpus: int) -> Iterator[tuple[Any, list[dict[str, str]]]]:
    """A cluster whose head has so many CPUs, and the addresses of nodes that may join."""
    import ray
    from ray.cluster_utils import Cluster
    from raylign.cluster.session import loopback_host

    hosts = [{"node_ip_address": host} if (host := loopback_host(n)) else {} for n in (2, 3, 4, 5)]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False} | hosts[0])
    try:
        here = {f"_{key}": host for key, host in hosts[0].items()}
        ray.init(address=cluster.address, namespace="raylign", log_to_driver=False, **here)
        yield cluster, hosts[1:]
    finally:
        ray.shutdown()
        cluster.shutdown()


def nodes_come_and_go(folder: Path) -> dict[str, Any]:
    """One worker undisturbed; then nodes join, workers go 1 → 3 → 2, and the node of one is lost."""
    from raylign.cluster.rundir import RunDir

    # The head has room for the roles and one worker; each node that joins, for one worker.
    with cluster_of(3) as (cluster, hosts):
        alone = start(folder, "alone").end()
        run, hold = RunDir(folder / "spread"), folder / "hold"
        hold.touch()
        running = start(folder, "spread")
        until("a worker works", running, lambda: workers(run) == 1)
        nodes = [cluster.add_node(num_cpus=1, **host) for host in hosts[:2]]
        run.desire(rollout=3)
        until("three workers", running, lambda: workers(run) == 3)
        actors = named_actors("spread/")
        lost = next(name for name, node in actors.items() if node == nodes[0].node_id)
        hold.unlink()
        until("groups are running", running, lambda: run.status().get("groups", {}).get("running", 0) > 0)
        cluster.remove_node(nodes[0], allow_graceful=False)
        until("its worker is missed", running, lambda: bool(run.events("worker_lost")))
        hold.touch()
        run.desire(rollout=2)
        until("two are asked for", running, lambda: run.status()["wanted"] == {"rollout": 2, "reward": 1})
        hold.unlink()
        spread = running.end()
        return {"alone": alone, "spread": spread, "actors": actors, "lost": lost, "events": run.events()}


class Running:
    """A run in a thread; `end` waits for its summary and raises what it raised."""

    def __init__(self, work: Callable[[], dict[str, Any]]) -> None:
        self._work, self._result, self._error = work, {}, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001  raised again by `end`
            self._error = error

    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> dict[str, Any]:
        self._thread.join()
        if self._error:
            raise self._error
        return self._result


def start(folder: Path, name: str) -> Running:
    from raylign.trainers.data.inputs import read_inputs
    from raylign.trainers.opening import open_run
    from raylign.trainers.pipeline import run_recipe
    from raylign.trainers.recipe import load_recipe

    config = load_recipe(folder / f"{name}.yaml")
    run = open_run(config, folder, named=True, resume=False)
    inputs = read_inputs(config, run.path)
    return Running(lambda: run_recipe(config, run, inputs, lambda _: None))


def until(what: str, running: Running, holds: Callable[[], bool]) -> None:
    """Wait for a condition while the run goes on; fails when the run ends before it holds."""
    deadline = time.monotonic() + 90
    while not holds():
        if not running.alive():
            raise AssertionError(f"the run ended before {what}: {running.end()}")
        assert time.monotonic() < deadline, f"no sign that {what}"
        time.sleep(0.02)
    print(f"{time.monotonic():.1f} {what}", flush=True)


def workers(run: Any) -> int:
    return run.status().get("workers", {}).get("rollout", 0)


def named_actors(prefix: str) -> dict[str, str]:
    """Living actors by name, with the id of their node, from Ray's own table."""
    from ray._private.state import actors

    table = actors(actor_state_name="ALIVE").values()
    return {a["Name"]: a["Address"]["NodeID"] for a in table if a["Name"].startswith(prefix)}


if __name__ == "__main__":
    root = Path(sys.argv[2])
    try:
        told = globals()[sys.argv[1]](root)
    finally:
        (root / "hold").unlink(missing_ok=True)
    (root / "seen.json").write_text(json.dumps(told))
