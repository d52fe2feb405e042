"""`raylign run --prove-resume`: a few steps of the user's own recipe, once undisturbed and once killed in every stage.

Both are ordinary runs of the command line. The second one's controller gets SIGKILL in the middle of each stage, with
everything it had started; its supervisor goes on from the last checkpoint. Then all they left is compared.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..cluster.errors import RunFailed
from ..cluster.rundir import RunDir
from .comparison import Comparison, compare
from .config import RunConfig, stage_name

STEPS = 6
"""Of each stage, at most."""

_LOOK_SECONDS = 0.01


def prove(
    recipe: Path, config: RunConfig, overrides: Sequence[str], storage: Path, say: Callable[[str], None]
) -> tuple[Comparison, dict[str, int]]:
    """Run both and compare; also after how many steps of each stage the second one was killed.

    They stay in `<storage>/<name>.proof`. Raises `RunFailed` where either does not succeed, or ends before it could be
    killed.
    """
    place = (storage / f"{config.name}.proof").resolve()
    shutil.rmtree(place, ignore_errors=True)
    command = [sys.executable, "-m", "raylign.cli", "run", str(recipe), "--storage", str(place), "--json"]
    command += [part for override in [*overrides, *_small(config)] for part in ("--set", override)]
    calm, killed = RunDir(place / "undisturbed"), RunDir(place / "killed")
    say(f"undisturbed, in {calm.path}")
    _end(_start(command, calm), calm)
    say(f"with a kill in every stage, in {killed.path}")
    process = _start(command, killed)
    kills = _kill(process, killed, [stage_name(stage) for stage in config.stages])
    _end(process, killed)
    if missed := [name for name in map(stage_name, config.stages) if name not in kills]:
        raise RunFailed(f"stage {missed[0]} was over before it could be killed, so nothing is proven of it")
    return compare(calm, killed), kills


def _small(config: RunConfig) -> list[str]:
    """Overrides: a few steps, a checkpoint at each, nothing served."""
    sets = ["serve=null", "evaluation=null", "tracking.wandb='off'", "controller.max_restarts=9"]
    for i, stage in enumerate(config.stages):
        sets += [f"stages.{i}.steps={min(stage.steps or STEPS, STEPS)}", f"stages.{i}.checkpoint_every=1"]
    return sets


def _start(command: list[str], run: RunDir) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([*command, "--name", run.name], stdout=subprocess.DEVNULL)


def _end(process: "subprocess.Popen[bytes]", run: RunDir) -> None:
    if process.wait():
        raise RunFailed(f"the run in {run.path} did not succeed, so there is nothing to compare: see its run.log")


def _kill(process: "subprocess.Popen[bytes]", run: RunDir, stages: Sequence[str]) -> dict[str, int]:
    """Kill the controller once in each stage, when two of its steps are done; after how many they were."""
    kills: dict[str, int] = {}
    while process.poll() is None and len(kills) < len(stages):
        state: dict[str, Any] = run.status()
        name = state.get("stage", "")
        done = sum(m["stage"] == name for m in run.all_metrics()) if name in stages and name not in kills else 0
        if done >= 2 and state.get("status") == "running":
            os.kill(state["pid"], signal.SIGKILL)
            kills[name] = done
        time.sleep(_LOOK_SECONDS)
    return kills
