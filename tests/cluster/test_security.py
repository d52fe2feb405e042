"""What a cluster of this machine says to whoever has no token, and where a secret of the environment turns up."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from raylign.cluster.jobs import Jobs
from raylign.cluster.local import LocalCluster, down, up

from .commands import free_port, raylign

pytestmark = pytest.mark.multinode

SECRETS = {
    "WANDB_API_KEY": "canary-wandb-5f21",
    "HF_TOKEN": "canary-hub-77c0",
    "RAYLIGN_API_KEY": "canary-serve-1d9e",
    "JUDGE_KEY": "canary-judge-a3b4",
    "DATABASE_PASSWORD": "canary-other-0c66",
}
"""What users have in their shells, on the head and where they submit from."""

METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "JobInfoGcsService/GetAllJobInfo",
    "InternalKVGcsService/InternalKVGet",
    "NodeManagerService/GetNodeStats",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Pull",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
    "CoreWorkerService/PushTask",
    "RayletDriver/KVGet",
)
"""Calls of every kind of server that Ray has."""


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        started = up(2, cpus_per_node=2, port=free_port(), name="closed")
        yield started
        down("closed")


def listening(cluster: LocalCluster) -> dict[int, str]:
    """The ports that any network reaches, with the address that each is bound to."""
    found = [c for p in cluster.members() for c in p.net_connections("inet") if c.status == "LISTEN"]
    return {c.laddr.port: c.laddr.ip for c in found if not c.laddr.ip.removeprefix("::ffff:").startswith("127.")}


def answers(port: int) -> dict[str, str]:
    """What a server says to each call without a token, where it knows the call."""
    said = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in METHODS:
            call = channel.unary_unary(f"/ray.rpc.{method}")
            try:
                call(b"", timeout=10)
                said[method] = "OK"
            except grpc.RpcError as error:
                if (code := error.code().name) != "UNIMPLEMENTED":  # pyright: ignore[reportAttributeAccessIssue]
                    said[method] = code
    return said


def test_every_port_beyond_loopback_refuses_calls_without_a_token(cluster: LocalCluster) -> None:
    ports = listening(cluster)
    assert len(ports) >= 6, "the control store, two servers of each raylet, and agents: Ray binds them to every address"
    for port in ports:
        said = answers(port)
        assert said, f"port {port} knows none of Ray's calls: what listens there?"
        assert set(said.values()) == {"UNAUTHENTICATED"}, (port, said)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10)


def test_dashboard_and_jobs_refuse_without_a_token(cluster: LocalCluster) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/api/cluster_status", "/logical/actors"):
        assert httpx.get(cluster.jobs_url + path, trust_env=False).status_code == 401, path
    sent = httpx.post(f"{cluster.jobs_url}/api/jobs/", json={"entrypoint": "true"}, trust_env=False)
    assert sent.status_code == 401


def test_ray_client_refuses_without_a_token(cluster: LocalCluster) -> None:
    (server,) = [p for p in cluster.members() if "ray.util.client.server" in " ".join(p.cmdline())]
    (port,) = {c.laddr.port for c in server.net_connections("inet") if c.status == "LISTEN"}
    assert set(answers(port).values()) <= {"UNAUTHENTICATED"}
    code = f"import ray; ray.init('ray://127.0.0.1:{port}'); print(ray.nodes())"
    wrong = {**os.environ, "RAY_AUTH_TOKEN": "wrong", "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", code], env=wrong, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "NodeManagerAddress" not in done.stdout


REWARDS = """\
import os


def broken(completion, row):
    here = dict(os.environ)
    raise KeyError("no such column")
"""


@pytest.mark.slow
def test_secrets_of_the_environment_turn_up_nowhere(
    cluster: LocalCluster, tiny_grpo: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that succeeds and one that fails with a traceback; then every file and every page is read."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    small = {"stages__0__steps": 2, "stages__0__rollout__workers": 1, "tracking": "{wandb: offline, trackio: true}"}
    good, bad = tiny_grpo("good", **small), tiny_grpo("bad", **small)
    said = []
    for recipe in (good, bad):
        if recipe is bad:
            (tmp_path / "rewards.py").write_text(REWARDS)
            recipe.write_text(recipe.read_text().replace("rewards.py:vowels", "rewards.py:broken"))
        raylign("submit", recipe, "--address", cluster.jobs_url, "--storage", home / "runs", home=home)
        command = [sys.executable, "-m", "raylign.cli", "logs", recipe.stem, "-f", "--storage", str(home / "runs")]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
        said.append(done.stdout + done.stderr)
        raylign("report", recipe.stem, "--storage", home / "runs", home=home)
        for verb in ("status", "why", "top"):
            told = raylign(verb, recipe.stem, "--storage", home / "runs", "--json", home=home)
            said.append(told.stdout + told.stderr)
    assert json.loads((home / "runs/good/summary.json").read_text())["status"] == "succeeded"

    headers = {"Authorization": f"Bearer {Path(cluster.token_file).read_text().strip()}"}
    for path in (
        "/api/jobs/",
        "/nodes?view=summary",
        "/logical/actors",
        "/api/v0/workers",
        "/api/v0/runtime_envs",
        "/api/v0/tasks?detail=1",
    ):
        answer = httpx.get(cluster.jobs_url + path, headers=headers, trust_env=False, timeout=60)
        assert answer.is_success, (path, answer.text)
        said.append(answer.text)
    for job in (*Jobs(cluster.jobs_url).attempts("good"), *Jobs(cluster.jobs_url).attempts("bad")):
        said.append(Jobs(cluster.jobs_url).logs(job.submission_id))

    secrets = [*SECRETS.values(), Path(cluster.token_file).read_text().strip()]
    files = [p for root in (home / "runs", Path(cluster.folder)) for p in root.rglob("*") if p.is_file()]
    assert any(p.name == "run.log" for p in files)
    assert any("gcs_server" in p.name for p in files)
    assert any(p.suffix == ".safetensors" for p in files)
    for secret in secrets:
        assert not [str(p) for p in files if secret.encode() in p.read_bytes()]
        assert not [text[:200] for text in said if secret in text]
