"""`raylign run --prove-resume`: two real runs, one of them killed in the middle, and what they have in common."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_killed_run_is_shown_to_end_as_an_undisturbed_one(tiny_grpo: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_grpo("proven", stages__0__steps=40, stages__0__kl="null", cluster__cpus=3)
    command = [sys.executable, "-m", "raylign.cli", "run", str(recipe), "--prove-resume", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["equal"] is True
    assert 1 <= told["killed_after"]["grpo"] < 6
    assert not any(told["different"].values())
    assert all(told["same"].values())
