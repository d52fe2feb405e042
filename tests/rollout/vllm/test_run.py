"""A run whose policy and controller are in one environment and whose rollout actors are in the one with vLLM."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

OTHER = Path(__file__).parents[3] / ".venv" / "bin" / "python"


@pytest.fixture
def driver() -> str:
    """The Python of the toolkit's own environment, which has no vLLM."""
    if not OTHER.exists():
        pytest.skip(f"the driver's environment is not here: {OTHER} is absent (make install)")
    return str(OTHER)


def raylign(python: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "raylign.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


def recipe(tiny_grpo: Callable[..., Path], llama: Path, **changes: Any) -> Path:
    rollout = {"engine": "vllm", "python": sys.executable, "workers__max": 1}
    keys = {f"stages__0__rollout__{key}": value for key, value in (rollout | changes).items()}
    return tiny_grpo("run", model__path=llama, stages__0__steps=2, cluster__cpus=4, **keys)


def test_actors_of_two_environments_train_together(
    driver: str, llama: Path, tmp_path: Path, tiny_grpo: Callable[..., Path]
) -> None:
    done = raylign(driver, "run", str(recipe(tiny_grpo, llama)), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["status"] == "succeeded"
    assert summary["exact"] is False
    assert summary["weights"]["version"] == 2
    steps = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:  # vLLM's log-probs are the policy's, before and after the first update reached it
        assert step["mismatch/max"] < 1e-3
        assert step["tokens"] > 0


def test_a_driver_without_vllm_says_so_before_anything_starts(
    driver: str, llama: Path, tmp_path: Path, tiny_grpo: Callable[..., Path]
) -> None:
    for python, message in ((driver, "engine is vllm, which"), ("/none/such", "no Python at /none/such")):
        done = raylign(driver, "check", str(recipe(tiny_grpo, llama, python=python)), cwd=tmp_path)
        assert done.returncode == 2
        assert f"stages.0.rollout.{'engine' if python == driver else 'python'}" in done.stderr
        assert message in done.stderr
