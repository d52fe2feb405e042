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


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A head that has room for the policy and its scorer, and four hosts with room for one worker each."""
    if why := unavailable():
        pytest.skip(why)
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from raylign.cluster.auth import ensure_token

    ensure_token()
    folder = Path("/tmp") / f"rl-hosts-{os.getpid()}"
    with hosts(folder, 5) as made:
        made.start_node(0, 2)
        for number in (1, 2):
            made.start_node(number, 1)
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


def raylign(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "raylign.cli", *map(str, arguments)]


@pytest.mark.multinode
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_to_four_to_two_workers_a_lost_host_and_one_cut_off_leave_the_weights_as_they_are(
    network: Hosts, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    roles = {"stages__0__kl": "null", "stages__0__scoring": "{resources: {cpus: 0.5, colocate_with: policy}}"}
    roles |= {"stages__0__rollout__resources": "{split_from: policy}", "stages__0__rollout__slots": 8}
    roles |= {"stages__0__rollout__sampling__max_tokens": 100, "stages__0__rewards": HELD, "stages__0__steps": 20}
    workers = "{min: 1, max: 4, start: 1}"
    recipe = tiny_grpo("spread", **roles, stages__0__rollout__workers=workers)
    alone = tiny_grpo("alone", stages__0__steps=20, stages__0__kl="null", stages__0__rewards=HELD, cluster__cpus=4)
    storage, hold = tmp_path / "runs", tmp_path / "hold"
    alone.write_text(alone.read_text().replace("max_tokens: 12", "max_tokens: 100"))
    apart = raylign("run", alone, "--storage", storage)
    undisturbed = Run(apart, RunDir(storage / "alone"), tmp_path / "alone.log").end()

    command = raylign("run", recipe, "--storage", storage, "--address", network.control_store)
    hold.touch()
    run = Run(network.command(0, command), RunDir(storage / "spread"), tmp_path / "spread.log")
    run.until("one worker", lambda: run.workers() == 1)
    scaling = subprocess.Popen(raylign("scale", "spread", "--rollout", "4", "--storage", storage))
    for number in (3, 4):
        network.start_node(number, 1)
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
    network.start_node(2, 1)
    run.until("it is back", lambda: run.workers() == 3)
    scaled = subprocess.run(raylign("scale", "spread", "--rollout", "2", "--storage", storage), timeout=150)
    assert scaled.returncode == 0
    hold.unlink()
    summary = run.end()

    assert (summary["status"], summary["workers"]) == ("succeeded", {"min": 1, "max": 4})
    assert summary["weights"] == undisturbed["weights"]
    assert [e["after"] for e in run.dir.events("scaled")] == [4, 2]
