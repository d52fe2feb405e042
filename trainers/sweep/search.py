"""Run a sweep with Ray Tune: draw values, run trials side by side, end the worse ones early (ASHA 1810.05934)."""

import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...cluster.errors import DoesNotFit, InputError
from ...cluster.planning import Offer, plan
from ...cluster.rundir import RunDir
from ..config import RunConfig, stage_name
from ..pipeline import check_placement, demands
from ..stages import OnlineStage, StageConfig
from .space import Param, as_tune

if TYPE_CHECKING:
    from ray.tune import ResultGrid

    from .trial import Job

Mode = Literal["min", "max"]
_ENDLESS = 10**9
_WAITS = 10**6
"""Bytes that a trial's actor reserves, which only waits: Ray Tune wants something, and the CPUs are the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is compared: a metric of a stage, and whether less or more of it is better."""

    stage: str
    metric: str
    mode: Mode
    steps: int | None
    """Of the stage; None for one pass over its data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One trial: its run, the values it had, its last and best value of the metric, and how it ended."""

    run: str
    values: dict[str, Any]
    last: float | None
    best: float | None
    step: int | None
    status: str
    """`finished`, `ended early` or `failed`."""
    reason: str = ""
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)


def goal_of(config: RunConfig, stage: str | None, metric: str | None, mode: Mode | None) -> Goal:
    """The metric of the recipe's last stage that says most, unless others are named. Raises `InputError`."""
    stages = {stage_name(s): s for s in config.stages}
    if stage is not None and stage not in stages:
        raise InputError(f"--stage {stage!r} is none of the recipe's: {', '.join(stages)}")
    name = stage or list(stages)[-1]
    usual, usual_mode = _usual(stages[name])
    found = metric or usual
    return Goal(stage=name, metric=found, mode=mode or _mode(found, usual_mode), steps=stages[name].steps)


def _usual(stage: StageConfig) -> tuple[str, Mode]:
    if isinstance(stage, OnlineStage):
        return ("held_out/accuracy" if stage.held_out else "reward/mean"), "max"
    return ("eval_loss" if getattr(stage, "held_out", None) else "loss"), "min"


def _mode(metric: str, otherwise: Mode) -> Mode:
    if "loss" in metric:
        return "min"
    return "max" if any(word in metric for word in ("reward", "accurac", "pass@")) else otherwise


def at_once(config: RunConfig, nodes: Sequence[Offer], most: int) -> int:
    """How many runs of the recipe fit on the nodes side by side, up to `most`. Raises `DoesNotFit` for none."""
    check_placement(config, nodes)
    for count in range(2, most + 1):
        try:
            for stage in config.stages:
                plan([d for _ in range(count) for d in demands(stage)], nodes)
        except DoesNotFit:
            return count - 1
    return most


def search(
    job: "Job", params: Sequence[Param], goal: Goal, *, trials: int, concurrent: int, grace: int | None, seed: int
) -> list[Outcome]:
    """Run the trials on the connected Ray, best first in what is returned; goes on where a sweep was interrupted.

    A grid is tried whole, `trials` times where other values are drawn. A trial whose run fails fails alone.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from .trial import Trial

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the table says which trials failed, and why
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    longest = goal.steps or _ENDLESS
    kept = Path(job.storage) / ".tune"
    trainable = tune.with_resources(Trial, {"memory": _WAITS})
    if tune.Tuner.can_restore(str(kept / "sweep")):
        space = as_tune(params) | {"job": job}
        tuner = tune.Tuner.restore(
            str(kept / "sweep"), trainable, resume_unfinished=True, restart_errored=True, param_space=space
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=as_tune(params) | {"job": job},
            tune_config=tune.TuneConfig(
                metric=goal.metric,
                mode=goal.mode,
                num_samples=trials,
                search_alg=BasicVariantGenerator(max_concurrent=concurrent, random_state=seed),
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=longest, grace_period=grace or _grace(longest), reduction_factor=3
                ),
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=str(kept), verbose=0),
        )
    with redirect_stdout(sys.stderr):  # the answer alone goes to stdout
        results = tuner.fit()
    return outcomes(results, job, goal, [p.key for p in params])


def _grace(steps: int) -> int:
    """How many steps every trial has before it is compared."""
    return max(1, min(steps // 8, 50))


def outcomes(results: "ResultGrid", job: "Job", goal: Goal, keys: Sequence[str]) -> list[Outcome]:
    """What came of the trials, the best first."""
    found = [_outcome(result, job, goal, keys) for result in results]
    sign = 1 if goal.mode == "min" else -1
    return sorted(found, key=lambda o: math.inf if o.best is None else sign * o.best)


def _outcome(result: Any, job: "Job", goal: Goal, keys: Sequence[str]) -> Outcome:
    metrics, config = result.metrics or {}, result.config or {}
    run = RunDir(Path(job.storage) / f"trial-{Path(result.path).name.split('_')[2]}")
    lines = [m for m in run.all_metrics() if m["stage"] == goal.stage and goal.metric in m]
    curve = tuple((m["step"], float(m[goal.metric])) for m in lines)
    values = [value for _, value in curve if math.isfinite(value)]
    best = (min if goal.mode == "min" else max)(values, default=None)
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    succeeded = run.summary().get("status") == "succeeded"
    return Outcome(
        run=run.name,
        values={key: config[key] for key in keys if key in config},
        last=curve[-1][1] if curve else None,
        best=best,
        step=metrics.get("step"),
        status="failed" if error else "finished" if succeeded else "ended early",
        reason=error,
        curve=curve,
    )
