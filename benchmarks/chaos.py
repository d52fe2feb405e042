"""The kill matrix, whole: `python -m benchmarks.chaos`, from the root of the repository.

One run of a tiny model goes on undisturbed. Others of the same recipe suffer every cell of the matrix, a run a fault, a
cell every other step, and must end with the same metrics, samples and weights. Where a fault ends the run (it must say
so), it is resumed. Needs root, for a disk of a fixed size.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from . import results
from .cells import FAULTS, Cell, all_cells, impossible
from .table import write_table

RECIPE = """\
name: chaos
seed: 5
model: {{path: {model}}}
stages:
  - type: grpo
    adapter: {{type: lora, r: 4}}
    data: {{path: prompts.jsonl}}
    steps: {steps}
    batch_size: 32
    learning_rate: 1e-3
    checkpoint_every: 2
    timeout_seconds: 6
    rollout:
      workers: 2
      group_size: 8
      sampling: {{max_tokens: 12}}
      max_prompt_tokens: 40
      slots: 16
      timeout_seconds: 6
      health_seconds: 4
    schedule: constant
    rewards: [{{type: function, path: "rewards.py:vowels"}}]
    kl: {kl}
cluster: {{cpus: 8{address}}}
controller: {{pause_seconds: 0.1, hang_seconds: 2}}
"""
REWARDS = "def vowels(completion, row):\n    return float(sum(c in 'aeiou' for c in completion))\n"
_DISK = "64m"
_LIMIT_SECONDS = 1800.0


def steps_of(cells: Sequence[Cell]) -> int:
    """One cell every other step, at odd ones, after which there is a checkpoint; and quiet before and after."""
    return 2 * len(cells) + 2


def write_recipe(folder: Path, model: Path, steps: int, address: str = "", *, reference: bool = True) -> Path:
    """The recipe of both runs, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(10)))
    recipe = folder / "chaos.yaml"
    given = {"model": model, "steps": steps, "kl": "{coefficient: 0.01}" if reference else "null"}
    recipe.write_text(RECIPE.format(**given, address=f", address: '{address}'" if address else ""))
    return recipe


def suffer(recipe: Path, storage: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A run under its supervisor through these cells, resumed where one ends it; what happened to each of them.

    `seconds` is from the fault to the end of the next step, `outcome` `healed` or `ended, resumed`.
    """
    storage.mkdir(parents=True, exist_ok=True)
    plan = recipe.with_name(f"{storage.name}.json")
    planned = [{"step": 2 * i + 1, **asdict(cell)} for i, cell in enumerate(cells)]
    plan.write_text(json.dumps(planned))
    ended: set[int] = set()
    while code := _run(recipe, storage, plan):
        last = max((done["number"] for done in _done(plan)), default=-1)
        if code != 1 or last < 0 or last in ended:
            raise RuntimeError(f"the run ended with code {code} after cell {last}: see {recipe.parent / 'log'}")
        ended.add(last)
        (storage / "ballast").unlink(missing_ok=True)
    metrics = _lines(storage / "chaos/metrics.jsonl")
    return [_told(planned[d["number"]], d, d["number"] in ended, metrics) for d in _done(plan)]


def _run(recipe: Path, storage: Path, plan: Path) -> int:
    """Run to an end; its exit code. Raises `RuntimeError` where a process is left or it takes too long."""
    before = set(psutil.Process().children())
    command = [sys.executable, "-m", "benchmarks.saboteur", str(recipe), str(storage), str(plan)]
    with (recipe.parent / "log").open("a") as log:
        code = subprocess.run(command, stderr=log, timeout=_LIMIT_SECONDS).returncode
    give_up = time.monotonic() + 10
    while left := [p for p in psutil.Process().children() if p not in before and _runs(p)]:
        if time.monotonic() > give_up:
            raise RuntimeError(f"left by the run: {left}")
        time.sleep(0.1)
    return code


def _runs(process: psutil.Process) -> bool:
    from raylign.cluster.processes import running

    return running(process)


def _told(cell: dict[str, Any], done: dict[str, Any], ended: bool, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    following = cell["step"] + (cell["phase"] == "checkpoint")
    back = min(m["time"] for m in metrics if m["step"] >= following and m["time"] > done["time"])
    outcome = "ended, resumed" if ended else "healed"
    return {**cell, "outcome": outcome, "seconds": round(back - done["time"], 1)}


def _done(plan: Path) -> list[dict[str, Any]]:
    return _lines(Path(f"{plan}.done"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of a fixed size at a folder. Raises `CalledProcessError` where it cannot be mounted."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 all cells ended with the undisturbed run's result, 1 not."""
    from raylign.cluster.processes import adopt_orphans

    from .models import tiny_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all by default")
    faults = parser.parse_args(arguments).faults or FAULTS
    adopt_orphans()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    cells = {fault: [c for c in all_cells() if c.fault == fault and not impossible(c)] for fault in faults}
    steps = max(steps_of(of_fault) for of_fault in cells.values())
    recipe = write_recipe(place, tiny_model(place / "model"), steps)
    suffer(recipe, place / "calm", [])
    equal = [_suffer_one(recipe, place, fault, of_fault) for fault, of_fault in cells.items()]
    write_table(results.RESULTS)
    return 0 if all(equal) else 1


def _suffer_one(recipe: Path, place: Path, fault: str, cells: Sequence[Cell]) -> bool:
    """Have a run suffer all cells of one fault, and keep what came of them; whether nothing differs."""
    print(f"{fault}: {len(cells)} cells in {place}", file=sys.stderr)
    storage = place / fault.replace(" ", "-")
    with small_disk(storage):
        told = suffer(recipe, storage, cells)
        differ = differences(place / "calm/chaos", storage / "chaos")
        weights = [json.loads((s / "chaos/summary.json").read_text())["weights"] for s in (place / "calm", storage)]
    for cell in told:
        cell["equal"] = not (differ.get(cell["step"]) or differ.get(cell["step"] + 1))
    facts = {"machine": results.machine(), "versions": results.versions(), "date": results.now()}
    path = results.RESULTS / "chaos.json"
    kept = [case for case in results.read(path)["cases"] if case["fault"] != fault]
    results.write(path, {"name": "chaos", **facts, "cases": kept + told})
    print(json.dumps({"fault": fault, "weights": weights, "differences": differ}), file=sys.stderr)
    return weights[0] == weights[1] and not differ


if __name__ == "__main__":
    sys.exit(main())
