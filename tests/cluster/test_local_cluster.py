"""A cluster of three nodes on this machine, used as a user does: up, submit, logs, down."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import ClusterUnreachable, InputError, NotFound
from raylign.cluster.jobs import Jobs
from raylign.cluster.local import LocalCluster, down, find, up
from raylign.cluster.submission import Submission

pytestmark = pytest.mark.multinode


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own: the token and the state of clusters."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAYLIGN_HOME", str(folder / "raylign"))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.setenv("RAY_AUTH_MODE", "token")
        yield folder


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[LocalCluster]:
    started = up(3, cpus_per_node=2, port=free_port(), name="test")
    yield started
    if find("test"):
        down("test")


def raylign(*arguments: str | Path, home: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raylign.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


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
from raylign.cluster.session import connect
with connect(ClusterConfig(address={cluster.address!r})) as session:
    import ray
    print(session.local, sorted(n["NodeManagerAddress"] for n in ray.nodes()))
"""

    def driver(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=60
        )

    assert "False ['127.0.0.2', '127.0.0.3', '127.0.0.4']" in driver().stdout
    assert "ClusterUnreachable" in driver(RAY_AUTH_TOKEN="wrong").stderr


def test_a_job_is_followed_to_its_end(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("beside the recipe")
    (tmp_path / ".gitignore").write_text("*.txt")
    written: list[str] = []
    jobs = Jobs(cluster.jobs_url)
    script = "import time; print(open('data.txt').read()); time.sleep(1); print('the end')"
    job, new = jobs.submit("fine", f'python -c "{script}"', working_dir=tmp_path)
    assert new
    ended = jobs.follow(job.submission_id, written.append)
    assert (ended.status, ended.exit_code) == ("succeeded", 0)
    assert "".join(written).count("beside the recipe\nthe end\n") == 1

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


def test_a_recipe_is_submitted_and_its_log_read(cluster: LocalCluster, home: Path, tiny_model: Path) -> None:
    """A real run: its model lies outside the recipe's folder, its data inside."""
    folder = home / "recipe"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]}] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"type": "sft", "steps": 1, "batch_size": 4, "adapter": {"r": 2}, "data": {"path": "rows.jsonl"}}
    model = os.path.relpath(tiny_model, folder)
    (folder / "tiny.yaml").write_text(json.dumps({"name": "tiny", "model": {"path": model}, "stages": [stage]}))

    sent = raylign("submit", "recipe/tiny.yaml", "--address", cluster.jobs_url, home=home)
    assert sent.stdout == "tiny\n"
    read = raylign("logs", "tiny", "-f", home=home)
    assert "tiny: succeeded" in read.stderr
    assert json.loads((home / "runs" / "tiny" / "summary.json").read_text())["status"] == "succeeded"

    again = json.loads(raylign("submit", "recipe/tiny.yaml", "--address", cluster.jobs_url, "--json", home=home).stdout)
    assert (again["new"], again["status"]) == (False, "succeeded")


def test_logs_of_a_failed_job_exit_with_its_code(cluster: LocalCluster, home: Path) -> None:
    job, _ = Jobs(cluster.jobs_url).submit("wrong", "seq 1000 1100; exit 4")
    Submission("wrong", cluster.jobs_url, job.submission_id, (job.submission_id,), str(home / "runs")).save()
    wait_for(Jobs(cluster.jobs_url), job.submission_id, "failed")
    done = raylign("logs", "wrong", "-f", "--tail", "2", home=home, code=4)
    assert "1100\n" in done.stdout  # Ray may write a line of its own after it
    assert len(done.stdout.splitlines()) == 2


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
