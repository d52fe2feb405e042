"""Local sessions, each in a process of its own: the tests' process has a Ray already."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = """
import json, os, signal, sys, psutil, ray
from raylign.cluster.config import ClusterConfig
from raylign.cluster.session import connect

@ray.remote(num_cpus=0)
class Role:
    def environment(self):
        return {k: os.environ.get(k) for k in ("RAY_ADDRESS", "RAY_AUTH_MODE")}

def told(*_):
    print("told to end", flush=True)

signal.signal(signal.SIGTERM, told)
with connect(ClusterConfig(cpus=3)) as session:
    role = Role.options(name="run:policy").remote()
    facts = {"address": session.address, "dashboard": session.dashboard_url, "local": session.local}
    facts |= {"worker": ray.get(role.environment.remote()), "cpus": ray.cluster_resources()["CPU"]}
    facts["processes"] = [[p.pid, p.create_time()] for p in psutil.Process().children(recursive=True)]
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()
assert "RAY_ADDRESS" not in os.environ
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def driver(environment: dict[str, str]) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()


def alive(processes: list[list[Any]]) -> list[str]:
    found = []
    for pid, created in processes:
        try:
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until_gone(processes: list[list[Any]], seconds: float = 30) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_local_session_has_a_token_and_leaves_nothing(driver: Any, environment: dict[str, str]) -> None:
    import httpx

    facts = json.loads(driver.stdout.readline())
    assert facts["local"]
    assert facts["cpus"] == 3
    assert facts["worker"] == {"RAY_ADDRESS": facts["address"], "RAY_AUTH_MODE": "token"}
    token = Path(environment["HOME"]) / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600

    assert facts["dashboard"].startswith("http://127.0.0.1:")
    assert httpx.get(f"{facts['dashboard']}/api/jobs/", trust_env=False).status_code == 401

    ray = Path(sys.executable).parent / "ray"
    asked = environment | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": facts["address"]}
    actors = subprocess.run([ray, "list", "actors"], env=asked, capture_output=True, text=True, check=True)
    assert "run:policy" in actors.stdout

    driver.send_signal(signal.SIGTERM)
    assert driver.stdout.readline() == "told to end\n"
    driver.stdin.close()
    assert driver.wait(timeout=60) == 0
    assert alive(facts["processes"]) == []


def test_a_killed_driver_leaves_nothing_either(driver: Any) -> None:
    facts = json.loads(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert wait_until_gone(facts["processes"]) == []


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("127.0.0.1:1", 5, "no Ray cluster answers at 127.0.0.1:1"),
        ("http://127.0.0.1:8265", 2, "raylign submit"),
        ("nonsense", 2, "host:port"),
    ],
)
def test_a_wrong_address_is_one_clear_error(address: str, code: int, says: str) -> None:
    from raylign.cluster.errors import RaylignError
    from raylign.cluster.session import probe

    with pytest.raises(RaylignError, match=says) as error:
        probe(address)
    assert error.value.exit_code == code


def test_a_connected_process_keeps_its_connection(ray_session: str) -> None:
    import ray
    from raylign.cluster.config import ClusterConfig
    from raylign.cluster.session import connect

    with connect(ClusterConfig()) as session:
        assert session.address == ray_session
        assert not session.local
    assert ray.is_initialized()
