"""A cluster of three nodes on this machine, used as a user does: up, submit, logs, down."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import ClusterUnreachable, InputError, NotFound
from raylign.cluster.jobs import Jobs
from raylign.cluster.local import LocalCluster, down, find, up
from raylign.cluster.rundir import RunDir
from raylign.cluster.submission import Submission

from .commands import free_port, raylign, wait_until

pytestmark = pytest.mark.multinode


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[LocalCluster]:
    started = up(3, cpus_per_node=2, port=free_port(), name="test")
    yield started
    if find("test"):
        down("test")


def wait_for(jobs: Jobs, submission_id: str, status: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while jobs.status(submission_id).status != status:
        assert time.monotonic() < deadline, jobs.status(submission_id)
        time.sleep(0.1)


def test_three_nodes_are_alive(cluster: LocalCluster) -> None:
    """Seen through the state API, which asks for the token."""
    ray = Path(sys.executable).parent / "ray"
    asked = os.environ | {"RAY_ADDRESS": cluster.jobs_url}
    done = subprocess.run(
        [ray, "list", "nodes", "--format=json"], env=asked, capture_output=True, text=True, check=True
    )
    nodes: list[dict[str, Any]] = json.loads(done.stdout)
    assert [node["state"] for node in nodes] == ["ALIVE"] * 3
    assert [node["resources_total"]["CPU"] for node in nodes] == [2.0] * 3


def test_the_jobs_api_asks_for_the_token(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    assert httpx.get(f"{cluster.jobs_url}/api/jobs/", trust_env=False).status_code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ClusterUnreachable, match="refuses the token"):
        Jobs(cluster.jobs_url)


def test_a_driver_with_a_wrong_token_is_told_at_once(cluster: LocalCluster) -> None:
    script = f"""
from raylign.cluster.config import ClusterConfig
from raylign.cluster.session import connect, probe
probe({cluster.address!r})  # as a run does before it reads its data
with connect(ClusterConfig(address={cluster.address!r})) as session:
    import ray
    print(session.local, sorted(n["NodeManagerAddress"] for n in ray.nodes()))
"""

    def driver(**environment: str) -> subprocess.CompletedProcess[str]:
        plain = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}  # as a user's shell
        return subprocess.run(
            [sys.executable, "-c", script], env=plain | environment, capture_output=True, text=True, timeout=60
        )

    assert "False ['127.0.0.2', '127.0.0.3', '127.0.0.4']" in driver().stdout
    assert "ClusterUnreachable" in driver(RAY_AUTH_TOKEN="wrong").stderr


def test_a_job_is_followed_to_its_end(cluster: LocalCluster, tmp_path: Path) -> None:
    # One write with its end of line: Ray's supervisor writes lines of its own into the same log.
    (tmp_path / "data.txt").write_text("beside the recipe\n")
    (tmp_path / ".gitignore").write_text("*.txt")
    written: list[str] = []
    jobs = Jobs(cluster.jobs_url)
    go_on = tmp_path / "go-on"  # so that the log is followed while the job runs
    job, new = jobs.submit(
        "fine", f"cat data.txt; until test -e {go_on}; do sleep 0.1; done; echo the end", working_dir=tmp_path
    )
    assert new

    def write(text: str) -> None:
        written.append(text)
        if "beside the recipe" in text:
            go_on.touch()

    ended = jobs.follow(job.submission_id, write)
    assert (ended.status, ended.exit_code) == ("succeeded", 0)
    lines = "".join(written).splitlines()
    assert [lines.count("beside the recipe"), lines.count("the end")] == [1, 1]

    again, new = jobs.submit("fine", "true")
    assert not new
    assert again.submission_id == job.submission_id


def test_a_failing_job_gives_its_code_and_can_be_tried_again(cluster: LocalCluster) -> None:
    jobs = Jobs(cluster.jobs_url)
    first, _ = jobs.submit("bad", "echo no; exit 3")
    ended = jobs.follow(first.submission_id, lambda _: None)
    assert (ended.status, ended.exit_code) == ("failed", 3)
    second, new = jobs.submit("bad", "sleep 600")
    assert new
    assert [a.submission_id for a in jobs.attempts("bad")] == [first.submission_id, second.submission_id]
    wait_for(jobs, second.submission_id, "running")
    assert jobs.submit("bad", "true") == (jobs.status(second.submission_id), False)
    jobs.stop(second.submission_id)
    assert jobs.follow(second.submission_id, lambda _: None).exit_code == 1


def test_a_job_nobody_knows_is_not_found(cluster: LocalCluster) -> None:
    with pytest.raises(NotFound, match="no such job"):
        Jobs(cluster.jobs_url).status("raylign-nobody-1")


@pytest.mark.slow
def test_a_submitted_run_is_scaled_stopped_and_goes_on(
    cluster: LocalCluster, home: Path, tiny_model: Path, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    """Every command is a process of its own, so the run lives on without the one that sent it."""
    model = os.path.relpath(tiny_model, tmp_path)  # outside the folder that is sent
    recipe = tiny_grpo("life", model__path=model, stages__0__steps=5000, stages__0__kl="null")
    run = RunDir(home / "runs" / "life")

    def submit() -> dict[str, Any]:
        return json.loads(raylign("submit", recipe, "--address", cluster.jobs_url, "--json", home=home).stdout)

    first = submit()
    assert (first["run"], first["attempt"], first["new"]) == ("life", 1, True)
    wait_until("it trains", lambda: len(run.all_metrics()) > 2, run)
    assert submit()["new"] is False
    for count in (3, 1):
        raylign("scale", "life", "--rollout", str(count), home=home)
        status = json.loads(raylign("status", "life", "--json", home=home).stdout)
        assert (status["status"], status["workers"]["rollout"]) == ("running", count)
    assert [(e["before"], e["after"]) for e in run.events("scaled")] == [(1, 3), (3, 1)]

    raylign("stop", "life", home=home)
    followed = raylign("logs", "life", "-f", home=home, code=1)
    assert followed.stderr.endswith("life: stopped\n")
    saved = run.status()["step"]
    assert saved > 2

    again = submit()
    assert (again["attempt"], again["new"]) == (2, True)
    wait_until("it has gone on", lambda: run.all_metrics()[-1]["step"] > saved, run)
    assert [e["step"] for e in run.events("resumed")] == [saved]
    assert json.loads(raylign("stop", "life", "--json", home=home).stdout)["status"] == "stopped"


@pytest.mark.slow
def test_a_job_whose_controller_is_killed_ends_as_if_it_had_not_been(
    cluster: LocalCluster, home: Path, tiny_model: Path, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    sets = {
        "model__path": os.path.relpath(tiny_model, tmp_path),
        "stages__0__steps": 12,
        "stages__0__checkpoint_every": 2,
        "stages__0__kl": "null",
        "stages__0__rewards": "[{type: function, path: 'rewards.py:held', timeout_seconds: 120}]",
    }
    calm, killed = (RunDir(home / "runs" / name) for name in ("calm", "killed"))
    for run in (calm, killed):  # side by side: the cluster has room for both
        raylign("submit", tiny_grpo(run.name, **sets), "--address", cluster.jobs_url, home=home)
    wait_until("three steps are done", lambda: len(killed.all_metrics()) >= 3, killed)
    (tmp_path / "hold").touch()
    os.kill(killed.status()["pid"], signal.SIGKILL)
    wait_until("that is noticed", lambda: bool(killed.events("controller_lost")), killed)
    (tmp_path / "hold").unlink()
    for run in (calm, killed):
        raylign("logs", run.name, "-f", home=home)
    assert [job.status for job in Jobs(cluster.jobs_url).attempts("killed")] == ["succeeded"]
    assert [e["reason"] for e in killed.events("controller_lost")] == ["it was ended by SIGKILL"]
    assert (killed.summary()["status"], killed.summary()["restarts"]) == ("succeeded", 1)
    assert killed.summary()["weights"] == calm.summary()["weights"]


@pytest.mark.parametrize(("script", "status", "code"), [("exit 4", "failed", 4), ("true", "succeeded", 0)])
def test_logs_of_an_ended_job_exit_with_its_code(
    cluster: LocalCluster, home: Path, script: str, status: str, code: int
) -> None:
    job, _ = Jobs(cluster.jobs_url).submit(status, f"seq 1000 1100; {script}")
    Submission(status, cluster.jobs_url, job.submission_id, (job.submission_id,), str(home / "runs")).save()
    wait_for(Jobs(cluster.jobs_url), job.submission_id, status)
    done = raylign("logs", status, "-f", "--tail", "2", home=home, code=code)
    assert "1100\n" in done.stdout  # Ray may write a line of its own after it
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == f"{status}: {status}\n"


def test_a_second_one_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(InputError, match="'test' is up already, with 3 nodes"):
        up(1, name="test", port=free_port())
    with pytest.raises(InputError, match=r"port .* cannot be used"):
        up(1, name="other", port=int(cluster.jobs_url.rpartition(":")[2]))


def test_down_leaves_no_process_behind(cluster: LocalCluster, home: Path) -> None:
    """Even with a job that runs, a node that was killed, and a child that detached itself."""
    jobs = Jobs(cluster.jobs_url)
    job, _ = jobs.submit("busy", "setsid sleep 600 & echo detached; sleep 600")
    wait_for(jobs, job.submission_id, "running")
    raylet = next(p for p in cluster.members() if p.name() == "raylet" and "127.0.0.4" in " ".join(p.cmdline()))
    raylet.kill()
    before = {(p.pid, p.create_time()) for p in cluster.members()} | set(cluster.processes)
    assert len(before) > 20

    assert "processes ended" in raylign("down", "--name", "test", home=home).stdout
    left = [p for p in psutil.process_iter() if (p.pid, p.create_time()) in before]
    assert [p.cmdline() for p in left if p.status() != psutil.STATUS_ZOMBIE] == []
    assert not Path(cluster.folder).exists()
    assert find("test") is None
    raylign("down", "--name", "test", home=home, code=4)
    up_again = socket.socket()
    with up_again:
        up_again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        up_again.bind(("127.0.0.1", int(cluster.jobs_url.rpartition(":")[2])))
