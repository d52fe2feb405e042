"""A run: its stages one after the other, then publish, serve, evaluate, report.

What is finished is noted in `progress.json`, so a resumed run begins with the first stage that is not.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cluster.placement import Demand, Offer, plan
from ..cluster.rundir import RunDir, write_atomically
from .config import RunConfig, stage_name
from .inputs import Inputs
from .memory import PeakMemory
from .model_state import ModelState, StageOutcome, starting_model
from .offline import run_offline_stage
from .online_stage import run_online_stage
from .publish import publish, serve_and_evaluate
from .report import write_report
from .stages import GrpoStage, StageConfig
from .stopping import StopRequested, stop_if_asked
from .tracking import Tracker, open_tracker

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage that is done, as `progress.json` keeps it; folders relative to nothing, so absolute."""

    name: str
    type: str
    steps: int
    seconds: float
    metrics: dict[str, float]
    base: str
    adapter: str | None
    restarts: int = 0
    version: int = 0
    workers: tuple[int, int] = (1, 1)


def check_placement(config: RunConfig, nodes: Sequence[Offer]) -> None:
    """Raise `DoesNotFit` if any stage asks for more than the nodes have."""
    for stage in config.stages:
        plan(demands(stage), nodes)
    if config.serve:
        resources = config.serve.resources
        plan([Demand("serve replica", config.serve.replicas, resources.cpus, resources.gpus)], nodes)


def demands(stage: StageConfig) -> list[Demand]:
    """What a stage's actors reserve at its start."""
    if not isinstance(stage, GrpoStage):
        return [Demand("train worker", stage.workers, stage.resources.cpus, stage.resources.gpus)]
    roles = [("policy", 1, stage.policy), ("reward", stage.scoring.workers, stage.scoring.resources)]
    roles += [("reference", 1, stage.reference)] if stage.kl else []
    roles += [("rollout", stage.rollout.workers.start, stage.rollout.resources)]
    return [Demand(role, count, r.cpus, r.gpus) for role, count, r in roles]


def run_recipe(config: RunConfig, run: RunDir, inputs: Inputs, say: Say) -> dict[str, Any]:
    """Do what is left of a run on the connected Ray, and write its summary and report. Returns the summary.

    A run that was asked to stop ends with status `stopped`; errors are the caller's to write down with `fail`.
    """
    began = time.time()
    memory = PeakMemory()
    tracker = open_tracker(config.tracking, run.path, config.name, config.model_dump(mode="json"))
    served, evaluation, stopped = None, {}, False
    try:
        _run_stages(config, run, inputs, tracker, say)
        if config.serve:
            say("publishing")
            names = publish(config, run, finished(run))
            served, evaluation = serve_and_evaluate(config, run, inputs, names, say)
    except StopRequested:
        stopped = True
    finally:
        tracker.finish()
        memory.stop()
    status = "stopped" if stopped else "succeeded"
    reason = f"asked to stop: `raylign resume {run.name}` goes on" if stopped else ""
    return conclude(
        config,
        run,
        status,
        reason,
        seconds=time.time() - began,
        peak_memory_gb=memory.gigabytes,
        served=served,
        evaluation=evaluation,
    )


def conclude(
    config: RunConfig,
    run: RunDir,
    status: str,
    reason: str,
    *,
    seconds: float = 0.0,
    peak_memory_gb: float = 0.0,
    served: dict[str, str] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `summary.json`, the last status and the report."""
    done = finished(run)
    earlier = run.status().get("wall_seconds", 0.0)
    last = next((d for d in reversed(done) if d.adapter), None)
    summary = {
        "run": run.name,
        "status": status,
        "reason": reason,
        "seed": config.seed,
        "stages": [{k: asdict(d)[k] for k in ("name", "type", "steps", "seconds", "metrics")} for d in done],
        "evaluation": evaluation or {},
        "weights": {"version": last.version, "digest": Path(last.adapter or "").name} if last else None,
        "served": served,
        "wall_seconds": earlier + seconds,
        "peak_memory_gb": max(peak_memory_gb, run.summary().get("peak_memory_gb", 0.0)),
        "restarts": sum(d.restarts for d in done),
        "workers": {
            "min": min((d.workers[0] for d in done), default=0),
            "max": max((d.workers[1] for d in done), default=0),
        },
    }
    run.write_summary(summary)
    run.update_status(status=status, reason=reason, workers={}, wall_seconds=earlier + seconds)
    run.event("run_ended", status=status, reason=reason)
    write_report(run)
    return summary


def finished(run: RunDir) -> list[Finished]:
    """The stages that are done."""
    path = run / "progress.json"
    return [Finished(**record) for record in json.loads(path.read_text())] if path.exists() else []


def _run_stages(config: RunConfig, run: RunDir, inputs: Inputs, tracker: Tracker, say: Say) -> None:
    """Run the stages that are left. Raises `StopRequested` when the run was asked to end early."""
    done = finished(run)
    model = ModelState(Path(done[-1].base), Path(done[-1].adapter) if done[-1].adapter else None) if done else None
    for index, stage in enumerate(config.stages):
        if index < len(done):
            continue
        stop_if_asked(run)
        name = stage_name(stage)
        say(f"stage {index + 1}/{len(config.stages)}: {name}")
        run.event("stage_began", stage=name)
        run.update_status(status="running", stage=name, step=0, steps=stage.steps)
        start = starting_model(stage, index, model or ModelState(inputs.model), run)
        outcome = _run_stage(config, stage, index, start, inputs, run, tracker)
        if outcome.stopped:
            raise StopRequested
        model = outcome.model
        done.append(_note(name, stage.type, outcome))
        write_atomically(run / "progress.json", json.dumps([asdict(d) for d in done], indent=1))
        run.event("stage_ended", stage=name, seconds=outcome.seconds)


def _run_stage(
    config: RunConfig, stage: StageConfig, index: int, model: ModelState, inputs: Inputs, run: RunDir, tracker: Tracker
) -> StageOutcome:
    name, given = stage_name(stage), inputs.stages[index]
    if isinstance(stage, GrpoStage):
        return run_online_stage(
            config,
            stage,
            index,
            model,
            given,
            inputs.tokenizer,
            run,
            on_metrics=lambda step, metrics: tracker.log(step, metrics, name),
        )
    return run_offline_stage(
        stage,
        index=index,
        model=model,
        encoded=given.proof.require(),
        seed=config.seed,
        run_dir=run,
        init_random=index == 0 and config.model.init == "random",
    )


def _note(name: str, kind: str, outcome: StageOutcome) -> Finished:
    adapter = outcome.model.adapter
    return Finished(
        name=name,
        type=kind,
        steps=outcome.steps,
        seconds=outcome.seconds,
        metrics=outcome.metrics,
        base=str(outcome.model.base),
        adapter=str(adapter) if adapter else None,
        restarts=outcome.restarts,
        version=outcome.version,
        workers=outcome.workers,
    )
