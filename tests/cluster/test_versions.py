"""A cluster whose nodes have other versions is refused before anything starts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raylign.cluster.local import down, up
from raylign.cluster.versions import differences, here, of_nodes, require_equal

from .commands import free_port

MINE = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "raylign": "0.1.0"}


@pytest.mark.parametrize(
    ("name", "there", "fatal"),
    [
        ("python", "3.11.9", False),
        ("python", "3.12.7", True),
        ("ray", "2.60.1", True),
        ("torch", "2.13.1+cu126", False),
        ("torch", "2.12.0", True),
        ("torch", "", True),
        ("raylign", "0.1.1", True),
        ("raylign", "", True),
    ],
)
def test_which_differences_matter(name: str, there: str, fatal: bool) -> None:
    (found,) = differences(MINE, {"10.0.0.7": MINE | {name: there}, "10.0.0.8": dict(MINE)})
    assert (found.node, found.name, found.fatal) == ("10.0.0.7", name, fatal)
    assert str(found) == f"{name} is {there or 'not installed'} on node 10.0.0.7 and {MINE[name]} here"


def test_those_that_matter_come_first() -> None:
    found = differences(MINE, {"a": MINE | {"torch": "2.13.9"}, "b": MINE | {"ray": "2.61.0"}})
    assert [(d.node, d.fatal) for d in found] == [("b", True), ("a", False)]


def test_the_nodes_of_one_environment_are_equal(ray_session: str) -> None:
    assert list(of_nodes().values()) == [here()]
    assert require_equal() == []


@pytest.mark.multinode
@pytest.mark.slow
def test_a_run_on_nodes_with_another_torch_is_refused(
    home: Path, tiny_grpo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "torch-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")]))
    cluster = up(1, cpus_per_node=4, port=free_port(), name="other")
    monkeypatch.undo()
    try:
        command = [sys.executable, "-m", "raylign.cli", "run", str(tiny_grpo("refused")), "--address", cluster.address]
        environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(home / "token"), "RAY_AUTH_MODE": "token"}
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        monkeypatch.setenv("RAYLIGN_HOME", str(home / "raylign"))
        down("other")
    assert done.returncode == 2, done.stderr
    assert "torch is 1.2.3 on node 127.0.0.2 and " in done.stderr
    assert "install torch==" in done.stderr
    assert not (home / "runs" / "refused").exists()
