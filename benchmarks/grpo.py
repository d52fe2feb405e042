"""The whole loop against TRL's GRPOTrainer: seconds a step, reward curves, time to a fixed reward, the split by phase.

The quickstart's task and model: its two first stages are trained once, then a pair is a run of each side on the same
adapter, prompts, rewards, group, lengths and learning rate; the pair's number is the seed of both. Rates are the same
step by step: with transformers' warm-up, whose first step has none, TRL's curve would come from others, on a task that
the peak makes unsteady. Each run is a process of its own on all cores this one may use, and its steps are timed from
the end of its first one: what comes before stands in `settings` as `start_seconds`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from raylign.trainers.schedule import learning_rate  # pyright: ignore[reportMissingImports]
from raylign.trainers.stages import DataConfig, StageBase  # pyright: ignore[reportMissingImports]

from .arena import Arena
from .curves import comparison
from .measured import Case, Contest, Measured

_CORES = os.sched_getaffinity(0)
_RECIPE = Path(__file__).parents[1] / "recipes/quickstart.yaml"
_OURS = "from raylign.cli.main import main; main()"
_SECONDS = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What both sides do."""

    steps: int
    batch: int = 128
    """Completions of a step."""
    group: int = 8
    max_tokens: int = 40
    learning_rate: float = 2e-3
    warmup_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    pretraining: tuple[int, int] = (400, 160)
    """Steps of the stages before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What every run starts from."""

    base: Path
    adapter: Path
    prompts: Path


def cases() -> list[Case]:
    """One: what the quickstart's GRPO stage does, over thirty steps."""
    return [_case("quickstart-vs-trl", Plan(steps=30))]


def quick_cases() -> list[Case]:
    """A few steps from an almost random model."""
    return [_case("quick-vs-trl", Plan(steps=3, batch=32, max_tokens=16, pretraining=(2, 2)))]


def _case(name: str, plan: Plan) -> Case:
    return Case(name=name, peer="GRPOTrainer", unit="steps/s", group=name, make=partial(_contest, plan))


def _contest(plan: Plan, arena: Arena) -> Contest:
    start: Start = arena.get(prepared, plan, arena.root)
    settings: dict[str, Any] = {"plan": asdict(plan), "cores": len(_CORES)}
    runs: dict[str, list[list[dict[str, float]]]] = {"ours": [], "theirs": []}

    def run(side: str, seed: int) -> Measured:
        folder = arena.root / f"{side}-{seed}"
        folder.mkdir()
        runs[side].append((_ours if side == "ours" else _theirs)(plan, start, folder, seed))
        settings.update(comparison(runs["ours"], runs["theirs"]))
        lines = runs[side][-1]
        seconds = lines[-1]["seconds"] - lines[0]["seconds"]
        return Measured(amount=len(lines) - 1, seconds=seconds, cpu_seconds=seconds)

    return Contest(ours=partial(run, "ours"), theirs=partial(run, "theirs"), warm_up=lambda: None, settings=settings)


def prepared(plan: Plan, root: Path) -> Start:
    """Pre-train and fine-tune the quickstart's model with its own first stages."""
    shutil.copytree(_RECIPE.with_name("quickstart"), root / "quickstart")
    recipe = yaml.safe_load(_RECIPE.read_text())
    for stage, steps in zip(recipe["stages"][:2], plan.pretraining, strict=True):
        stage["steps"] = steps
        stage["warmup_steps"] = min(stage.get("warmup_steps", 5), steps)
    kept = {key: recipe[key] for key in ("seed", "prepare", "model", "cluster")}
    run = _raylign(root, {**kept, "name": "start", "stages": recipe["stages"][:2]})
    last = json.loads((run / "progress.json").read_text())[-1]
    return Start(base=Path(last["base"]), adapter=Path(last["adapter"]), prompts=run / "prepared/prompts.jsonl")


def _raylign(root: Path, recipe: dict[str, Any]) -> Path:
    """Run a recipe as a user does; its run directory."""
    path = root / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    _in_a_process([sys.executable, "-c", _OURS, "run", str(path), "--storage", str(root / "runs")], root)
    return root / "runs" / recipe["name"]


def _in_a_process(command: list[str], folder: Path) -> None:
    """On all cores, whatever this process is bound to. Raises `RuntimeError` with its last words where it fails."""
    log = folder / "log"
    with log.open("a") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: os.sched_setaffinity(0, _CORES),
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        try:
            code = process.wait(_SECONDS)
        except BaseException:
            process.terminate()  # a run ends its Ray then
            process.wait(60)
            raise
    if code:
        raise RuntimeError(f"{command[:3]} ended with {code}: …{log.read_text()[-2000:]}")


def recipe_of(plan: Plan, start: Start, seed: int) -> dict[str, Any]:
    """The quickstart's GRPO stage alone, with what TRL has not switched off: KL, dual clip, the engine's correction."""
    recipe = yaml.safe_load(_RECIPE.read_text())
    stage = recipe["stages"][2] | {
        "adapter": {"path": str(start.adapter)},
        "data": {"path": str(start.prompts), "format": "prompt"},
        "steps": plan.steps,
        "batch_size": plan.batch,
        "learning_rate": plan.learning_rate,
        "warmup_steps": plan.warmup_steps,
        "betas": list(plan.betas),
        "checkpoint_every": plan.steps,
        "clip": {"dual": None},
        "mismatch": None,
        "kl": None,
        "policy": {"ranks": len(_CORES), "shard": False},
    }
    stage["rollout"] |= {"group_size": plan.group, "sampling": {"temperature": 1.0, "max_tokens": plan.max_tokens}}
    model = {"path": str(start.base)}
    return {"name": "grpo", "seed": seed, "model": model, "cluster": recipe["cluster"], "stages": [stage]}


def rates(plan: Plan) -> list[float]:
    """The learning rate of each step, as the stage has it."""
    stage = StageBase(
        data=DataConfig(path=""),
        learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup_steps,
        schedule="linear",
    )
    return [learning_rate(stage, step, plan.steps) for step in range(plan.steps)]


def _ours(plan: Plan, start: Start, folder: Path, seed: int) -> list[dict[str, float]]:
    """A run of it; what its steps say."""
    shutil.copytree(_RECIPE.with_name("quickstart"), folder / "quickstart")
    began = time.time()
    run = _raylign(folder, recipe_of(plan, start, seed))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": line["time"] - began,
            "reward": line["reward/exact"],
            **{name: value for name, value in line.items() if name.startswith("seconds/")},
        }
        for line in lines
    ]


def _theirs(plan: Plan, start: Start, folder: Path, seed: int) -> list[dict[str, float]]:
    """The same by TRL."""
    spec = folder / "spec.json"
    paths = {name: str(path) for name, path in asdict(start).items()}
    task = {"sums": str(_RECIPE.with_name("quickstart")), "out": str(folder / "steps.jsonl"), "seed": seed}
    spec.write_text(json.dumps({**asdict(plan), **paths, **task, "rates": rates(plan)}))
    began = time.time()
    _in_a_process([sys.executable, "-m", "benchmarks.trl_grpo", str(spec)], folder)
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{**line, "seconds": line["seconds"] - began} for line in lines]
