"""Runs of a tiny model that are killed, suspended and starved, and what is left of them against one undisturbed."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from .cells import Cell

RECIPE = """\
name: chaos
seed: 5
model: {{path: {model}}}
stages:
  - type: ppo
    adapter: {{type: lora, r: 4}}
    data: {{path: prompts.jsonl}}
    steps: {steps}
    batch_size: 32
    learning_rate: 1e-3
    policy: {{ranks: 2}}
    critic: {{learning_rate: 1e-3}}
    checkpoint_every: 2
    timeout_seconds: 10
    rollout:
      workers: 2
      group_size: 8
      sampling: {{max_tokens: 12}}
      max_prompt_tokens: 40
      slots: 16
      timeout_seconds: 10
      health_seconds: 6
    schedule: constant
    rewards: [{{type: function, path: "rewards.py:vowels"}}]
    kl: {{coefficient: 0.01}}
cluster: {{cpus: 8}}
controller: {{pause_seconds: 0.1, hang_seconds: 2}}
"""
REWARDS = "def vowels(completion, row):\n    return float(sum(c in 'aeiou' for c in completion))\n"
_RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
_LIMIT_SECONDS = 1800.0


def write_recipe(folder: Path, model: Path, steps: int, *sets: str) -> Path:
    """The recipe of such runs, in a folder of its own; `sets` override keys of it as `--set` does."""
    from raylign.trainers.recipe import dump_recipe, load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(10)))
    recipe = folder / "chaos.yaml"
    recipe.write_text(RECIPE.format(model=model, steps=steps))
    recipe.write_text(dump_recipe(load_recipe(recipe, list(sets))))
    return recipe


def every_other_step(cells: Sequence[Cell]) -> dict[int, Cell]:
    """One cell at each odd step, after which there is a checkpoint."""
    return {2 * i + 1: cell for i, cell in enumerate(cells)}


def suffer(recipe: Path, storage: Path, cells: Mapping[int, Cell]) -> list[dict[str, Any]]:
    """A run under its supervisor through these cells by step, resumed where one ends it; what happened to each of them.

    `seconds` is from the fault to the end of the next step, `outcome` `healed` or `ended, resumed`.
    """
    storage.mkdir(parents=True, exist_ok=True)
    plan = recipe.with_name(f"{storage.name}.json")
    planned = [{"step": step, **asdict(cell)} for step, cell in cells.items()]
    plan.write_text(json.dumps(planned))
    ended: set[int] = set()
    while code := _run(recipe, storage, plan):
        last = max((done["number"] for done in _done(plan)), default=-1)
        if code != 1 or last < 0 or last in ended:
            raise RuntimeError(f"the run ended with code {code} after cell {last}: see {recipe.parent / 'log'}")
        ended.add(last)
        (storage / "ballast").unlink(missing_ok=True)
    metrics = _lines(storage / "chaos/metrics.jsonl")
    return [_told(planned[d["number"]], moment(planned, plan, d), d["number"] in ended, metrics) for d in _done(plan)]


def moment(planned: list[dict[str, Any]], plan: Path, done: dict[str, Any]) -> float:
    """When a cell that is noted as done struck, in seconds since the epoch.

    Raises `RuntimeError` where what was to make an actor fail was never called.
    """
    cell = planned[done["number"]]
    if cell["role"] == "controller" or cell["fault"] in ("SIGKILL", "SIGSTOP"):
        return done["time"]
    for line in _lines(Path(f"{plan}.struck")):
        if line["number"] == done["number"]:
            return line["struck"]
    raise RuntimeError(f"{Cell(cell['fault'], cell['role'], cell['phase']).name} was prepared and never happened")


def _run(recipe: Path, storage: Path, plan: Path) -> int:
    """Run to an end; its exit code. Raises `RuntimeError` where a process is left or it takes too long."""
    before = set(psutil.Process().children(recursive=True))
    command = [sys.executable, "-m", "benchmarks.saboteur", str(recipe), str(storage), str(plan)]
    with (recipe.parent / "log").open("a") as log:
        code = subprocess.run(command, stderr=log, timeout=_LIMIT_SECONDS).returncode
    give_up = time.monotonic() + 10
    while left := _left(before):
        if time.monotonic() > give_up:
            raise RuntimeError(f"left by the run: {left}")
        time.sleep(0.1)
    return code


def _left(before: set[psutil.Process]) -> list[psutil.Process]:
    """What has been orphaned since, and workers that a Ray which stays still has for the run."""
    from raylign.cluster.processes import running

    this = psutil.Process()
    at_work = [p for p in this.children(recursive=True) if _title(p).startswith("ray::") and _title(p) not in _RAYS_OWN]
    new = {*this.children(), *(p for p in at_work if p.status() != psutil.STATUS_STOPPED)} - before
    return [p for p in new if running(p)]


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.NoSuchProcess:
        return ""


def _told(cell: dict[str, Any], moment: float, ended: bool, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    following = cell["step"] + (cell["phase"] == "checkpoint")
    back = min(m["time"] for m in metrics if m["step"] >= following and m["time"] > moment)
    outcome = "ended, resumed" if ended else "healed"
    return {**cell, "time": moment, "outcome": outcome, "seconds": round(back - moment, 1)}


def _done(plan: Path) -> list[dict[str, Any]]:
    return _lines(Path(f"{plan}.done"))


def _lines(path: Path) -> list[dict[str, Any]]:
    from raylign.cluster.rundir import read_lines

    return list(read_lines(path))


def differences(calm: Path, troubled: Path) -> dict[int, list[str]]:
    """Step → what two runs of one recipe differ in; empty where they are the same but for the clock."""
    from raylign.cluster.rundir import RunDir
    from raylign.trainers.comparison import metrics, samples

    found: dict[int, list[str]] = {}
    for read in (metrics, samples):
        ours, theirs = read(RunDir(calm)), read(RunDir(troubled))
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                found.setdefault(key[1], []).append(read.__name__)
    return found
