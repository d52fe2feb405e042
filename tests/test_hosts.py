"""A run on five hosts with networks of their own: it grows, loses one, and one is cut off and joins again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.rundir import RunDir

from .hosts import Hosts, hosts, unavailable

HELD = '[{type: function, path: "rewards.py:held", timeout_seconds: 300}]'
CUT_SECONDS = 60
SPOT = "ray.io/market-type=spot"


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """So many hosts, 5 by default, and a token of their own."""
    if why := unavailable():
        pytest.skip(why)
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from raylign.cluster.auth import ensure_token

    ensure_token()
    folder = Path("/tmp") / f"rl-hosts-{os.getpid()}"
    with hosts(folder, getattr(request, "param", 5)) as made:
        yield made
    subprocess.run(["rm", "-rf", str(folder)], check=True)


class Run:
    """`raylign run` in a process, on a host or here."""

    def __init__(self, command: list[str], run: RunDir, log: Path) -> None:
        self.dir, self._log = run, log
        self._process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def until(self, what: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert self._process.poll() is None, f"it ended before {what}: {self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no sign that {what}: {self.dir.status()}"
            time.sleep(0.1)
        print(f"{time.monotonic():.0f} {what}", flush=True)
        return found

    def workers(self) -> int:
        return self.dir.status().get("workers", {}).get("rollout", 0)

    def end(self, seconds: float = 240) -> dict[str, Any]:
        assert self._process.wait(timeout=seconds) == 0, self._log.read_text()[-3000:]
        return json.loads((self.dir / "summary.json").read_text())


WORK = {
    "stages__0__steps": 20,
    "stages__0__kl": "null",
    "stages__0__rewards": HELD,
    "stages__0__rollout__slots": 8,
    "stages__0__rollout__sampling__max_tokens": 100,
}
APART = WORK | {
    "stages__0__scoring": "{resources: {cpus: 0.5, colocate_with: policy}}",
    "stages__0__rollout__resources": "{split_from: policy}",
    "stages__0__rollout__workers": "{min: 1, max: 4, start: 1}",
}
"""The policy and its scorer on one host, workers on others."""


def run_alone(tiny_grpo: Callable[..., Path], folder: Path) -> dict[str, Any]:
    """The same with one worker on a local Ray, undisturbed."""
    recipe = tiny_grpo("alone", **WORK, cluster__cpus=4)
    command = raylign("run", recipe, "--storage", folder / "runs")
    return Run(command, RunDir(folder / "runs" / "alone"), folder / "alone.log").end()


def raylign(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "raylign.cli", *map(str, arguments)]


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_to_four_to_two_workers_a_lost_host_and_one_cut_off_leave_the_weights_as_they_are(
    network: Hosts, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    network.start_node(0, 8)  # has room for all; each other host for one worker
    for number in (1, 2):
        network.start_node(number, 1, SPOT)
    where = {"stages__0__rollout__resources": "{labels: {ray.io/market-type: spot}}"}
    recipe, storage, hold = tiny_grpo("spread", **APART | where), tmp_path / "runs", tmp_path / "hold"
    undisturbed = run_alone(tiny_grpo, tmp_path)

    command = raylign("run", recipe, "--storage", storage, "--address", network.control_store)
    hold.touch()
    run = Run(network.command(0, command), RunDir(storage / "spread"), tmp_path / "spread.log")
    run.until("one worker", lambda: run.workers() == 1)
    scaling = subprocess.Popen(raylign("scale", "spread", "--rollout", "4", "--storage", storage))
    for number in (3, 4):
        network.start_node(number, 1, SPOT)
    run.until("four workers", lambda: run.workers() == 4)
    assert scaling.wait(timeout=60) == 0
    hold.unlink()
    run.until("steps go on", lambda: run.dir.status().get("step", 0) >= 2)
    hold.touch()
    sent = [network.sent(number) for number in (1, 2, 3, 4)]
    print("bytes sent by each host", sent)
    assert min(sent) > 100_000, "every host takes part"

    network.kill(1)
    run.until("its worker is missed", lambda: len(run.dir.events("worker_lost")) == 1)
    network.cut(2)
    cut_at = time.monotonic()
    run.until("the one that is cut off is missed", lambda: len(run.dir.events("worker_lost")) == 2)
    hold.unlink()
    step = run.dir.status()["step"]
    run.until("the others go on", lambda: run.dir.status()["step"] > step)
    hold.touch()
    while time.monotonic() - cut_at < CUT_SECONDS:
        run.until("still running", lambda: True)
        time.sleep(1)
    network.join(2)
    network.kill(2)  # its raylet was given up; a service manager starts a node again
    network.start_node(2, 1, SPOT)
    run.until("it is back", lambda: run.workers() == 3)
    scaled = subprocess.run(raylign("scale", "spread", "--rollout", "2", "--storage", storage), timeout=150)
    assert scaled.returncode == 0
    hold.unlink()
    summary = run.end()

    assert (summary["status"], summary["workers"]) == ("succeeded", {"min": 1, "max": 4})
    assert summary["weights"] == undisturbed["weights"]
    assert [e["after"] for e in run.dir.events("scaled")] == [4, 2]


NODES = """
import ray
ray.init(address="auto", log_to_driver=False)
print("nodes", sum(node["Alive"] for node in ray.nodes()))
"""


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("network", [1], indirect=True)
def test_the_autoscaler_brings_nodes_for_workers_and_takes_them_back(
    network: Hosts, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    """The head has no room for a worker; nodes come for one, then three, and go when two are not wanted any more."""
    network.start_autoscaling_head(2, 4, idle_minutes=0.1)

    def nodes() -> int:
        env = os.environ | {"RAY_ADDRESS": network.control_store}
        command = network.command(0, [sys.executable, "-c", NODES])
        said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
        return int(said.split("nodes")[1])

    recipe = tiny_grpo("grown", **APART, cluster="{autoscaler: true, wait_seconds: 120}")
    storage, hold = tmp_path / "runs", tmp_path / "hold"
    undisturbed = run_alone(tiny_grpo, tmp_path)
    assert nodes() == 1
    hold.touch()
    command = raylign("run", recipe, "--storage", storage, "--address", network.control_store)
    run = Run(network.command(0, command), RunDir(storage / "grown"), tmp_path / "grown.log")
    run.until("a node has come for the first worker", lambda: run.workers() == 1)
    assert nodes() == 2
    subprocess.run(raylign("scale", "grown", "--rollout", "3", "--storage", storage), timeout=150, check=True)
    assert nodes() == 4
    subprocess.run(raylign("scale", "grown", "--rollout", "1", "--storage", storage), timeout=150, check=True)
    run.until("idle nodes have gone", lambda: nodes() == 2)
    hold.unlink()
    summary = run.end()
    assert (summary["status"], summary["workers"]["min"]) == ("succeeded", 1)
    assert summary["weights"] == undisturbed["weights"]
    deadline = time.monotonic() + 60
    while nodes() > 1:
        assert time.monotonic() < deadline, "the last worker's node stays though nothing is asked for"
        time.sleep(1)


CPT = """\
name: {name}
seed: 5
model: {{path: {model}}}
stages:
  - type: cpt
    data: {{path: texts.jsonl}}
    steps: 400
    batch_size: 8
    micro_batch_size: 2
    max_length: 512
    learning_rate: 0.003
    workers: {workers}
    checkpoint_every: 10
cluster: {{cpus: 2}}
"""


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("network", [3], indirect=True)
def test_training_workers_grow_with_the_cluster_and_survive_a_lost_host(
    network: Hosts, tiny_model: Path, tmp_path: Path
) -> None:
    """One host, then two, then one is lost; losses and weights are those of one worker, up to the order of sums."""
    texts = [json.dumps({"text": " ".join(str(n + k) for k in range(120))}) for n in range(64)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    storage = tmp_path / "runs"
    for name, workers in (("fixed", "1"), ("elastic", "{min: 1, max: 2}")):
        (tmp_path / f"{name}.yaml").write_text(CPT.format(name=name, model=tiny_model, workers=workers))
    fixed = Run(
        raylign("run", tmp_path / "fixed.yaml", "--storage", storage), RunDir(storage / "fixed"), tmp_path / "1"
    )
    alone = fixed.end()

    network.start_node(0, 0)
    network.start_node(1, 1)
    command = raylign("run", tmp_path / "elastic.yaml", "--storage", storage, "--address", network.control_store)
    run = Run(network.command(0, command), RunDir(storage / "elastic"), tmp_path / "elastic.log")

    def workers() -> int:
        return run.dir.status().get("workers", {}).get("train", 0)

    run.until("one worker trains", lambda: workers() == 1)
    network.start_node(2, 1)
    run.until("two train", lambda: workers() == 2)
    step = run.dir.status()["step"]
    run.until("a checkpoint of two", lambda: run.dir.status()["step"] > step + 20)
    network.kill(2)
    run.until("one goes on", lambda: workers() == 1)
    summary = run.end()

    assert (summary["status"], summary["workers"]) == ("succeeded", {"min": 1, "max": 2})
    assert alone["workers"] == {"min": 1, "max": 1}
    ours, theirs = ([m["loss"] for m in RunDir(storage / name).all_metrics()] for name in ("elastic", "fixed"))
    assert len(ours) == len(theirs) == 400
    assert ours == pytest.approx(theirs, rel=2e-3)
