"""A run: its stages one after the other, then publish, serve, evaluate, report.

What is finished is noted in `progress.json`, so a resumed run begins with the first stage that is not.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster.errors import InputError
from ..cluster.planning import Demand, Offer, plan
from ..cluster.rundir import RunDir, read_json, write_atomically
from ..cluster.weights import base_digest
from ..rollout.config import ModelReward, RewardConfig, RewardModelSource
from ..rollout.rewards.functions import reward_name
from .config import RunConfig, stage_name
from .data.inputs import Inputs
from .interrupt import StopRequested, asked, stop_if_asked
from .memory import PeakMemory
from .model_state import ModelState, StageOutcome, starting_model
from .offline.stage import run_offline_stage
from .online.stage import run_online_stage
from .publish import measure_forgetting, promote, publish, serve_and_evaluate
from .recipe import resolve_prepared
from .report.build import write_report
from .stages import OnlineStage, StageConfig
from .stages.wishes import role_demands
from .tracking import Tracker, open_tracker

logger = logging.getLogger(__name__)

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
    digest: str = ""
    """Of the adapter it left, or of the whole model where it trained all weights; what a served answer names."""
    reward_model: str | None = None
    """The folder of the reward model that it made; base and adapter are then those of the policy before, and the digest
    is the reward model's."""


def check_placement(config: RunConfig, nodes: Sequence[Offer]) -> None:
    """Raise `DoesNotFit` if any stage asks for more than the nodes have."""
    for stage in config.stages:
        plan(demands(stage), nodes)
    if config.serve:
        resources = config.serve.resources
        each = Demand(
            "serve replica", config.serve.replicas.start, resources.cpus, resources.gpus, labels=resources.labels
        )
        plan([each], nodes)


def demands(stage: StageConfig) -> list[Demand]:
    """What a stage's actors reserve at its start."""
    if not isinstance(stage, OnlineStage):
        each = stage.resources
        return [Demand("train worker", stage.workers.min, each.cpus, each.gpus, labels=each.labels)]
    return role_demands(stage.roles)


def run_recipe(config: RunConfig, run: RunDir, inputs: Inputs, say: Say) -> dict[str, Any]:
    """Do what is left of a run on the connected Ray, and write its summary and report. Returns the summary.

    A run that was asked to stop ends with status `stopped`; errors are the caller's to write down with `conclude`.
    """
    evaluation, promotion, url = {}, None, ""
    try:
        with _measured(run), _tracked(config, run) as tracker:
            _run_stages(config, run, inputs, tracker, say)
            if config.serve:
                say("publishing")
                names = publish(config, run, finished(run), inputs)
                url, evaluation = serve_and_evaluate(config, run, inputs, names, say)
                evaluation |= measure_forgetting(config, run, finished(run)[-1])
                promotion = promote(config, run, names[-1], evaluation, inputs.evaluation)
    except StopRequested:
        return conclude(config, run, "stopped", asked(run))
    reason, served = "", None
    if promotion and promotion["promoted"]:
        served = {"model": promotion["alias"], "url": url}
    elif promotion:
        reason = f"not promoted: {promotion['alias']} answers as before, the new model is {promotion['why']}"
    return conclude(config, run, "succeeded", reason, served=served, evaluation=evaluation, promotion=promotion)


@contextmanager
def _tracked(config: RunConfig, run: RunDir) -> Iterator[Tracker]:
    tracker = open_tracker(config.tracking, run.path, config.name, config.model_dump(mode="json"))
    try:
        yield tracker
    finally:
        tracker.finish()


@contextmanager
def _measured(run: RunDir) -> Iterator[None]:
    """Add the block's seconds to the run's status, and note its peak of memory there, however the block ends."""
    began, memory = time.time(), PeakMemory()
    try:
        yield
    finally:
        memory.stop()
        before = run.status()
        try:
            run.update_status(
                wall_seconds=before.get("wall_seconds", 0.0) + time.time() - began,
                peak_memory_gb=max(before.get("peak_memory_gb", 0.0), memory.gigabytes),
            )
        except OSError:
            logger.exception("the run's time and memory could not be noted")  # what ended the block matters more


def conclude(
    config: RunConfig,
    run: RunDir,
    status: str,
    reason: str,
    *,
    served: dict[str, str] | None = None,
    evaluation: dict[str, Any] | None = None,
    promotion: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `summary.json`, the last status and the report; a report that fails is an event, and changes nothing."""
    done, state = finished(run), run.status()
    last = done[-1] if done else None
    summary = {
        "run": run.name,
        "status": status,
        "reason": reason,
        "seed": config.seed,
        "stages": [{k: asdict(d)[k] for k in ("name", "type", "steps", "seconds", "metrics")} for d in done],
        "evaluation": evaluation or {},
        "weights": {"version": last.version, "digest": last.digest} if last else None,
        "served": served,
        "promotion": promotion,
        "exact": all(stage.rollout.is_exact for stage in config.stages if isinstance(stage, OnlineStage)),
        "alarms": alarms_of(run),
        "wall_seconds": state.get("wall_seconds", 0.0),
        "peak_memory_gb": state.get("peak_memory_gb", 0.0),
        **_workers_seen(config, done, state),
    }
    run.write_summary(summary)
    run.update_status(status=status, reason=reason, workers={})
    run.event("run_ended", status=status, reason=reason)
    _report(run)
    return summary


def alarms_of(run: RunDir) -> list[dict[str, Any]]:
    """The alarms that began in a run, in order: stage, step, which, what was seen, what to try."""
    keys = ("stage", "step", "alarm", "saw", "try")
    return list({(e["stage"], e["step"], e["alarm"]): {k: e[k] for k in keys} for e in run.events("alarm")}.values())


def _workers_seen(config: RunConfig, done: Sequence[Finished], state: dict[str, Any]) -> dict[str, Any]:
    """`restarts`, and `workers`: of rollout where the recipe has an online stage, else of training."""
    online = {stage_name(s) for s in config.stages if isinstance(s, OnlineStage)}
    seen = [(d.name, d.restarts, d.workers) for d in done]
    unfinished = state.get("unfinished", {}).items()
    seen += [(name, part["restarts"], tuple(part["workers"])) for name, part in unfinished]
    bounds = [workers for name, _, workers in seen if name in online or not online]
    return {
        "restarts": sum(restarts for _, restarts, _ in seen) + state.get("controller_restarts", 0),
        "workers": {
            "min": min((low for low, _ in bounds), default=0),
            "max": max((high for _, high in bounds), default=0),
        },
    }


def _report(run: RunDir) -> None:
    try:
        write_report(run)
    except Exception as error:  # whatever a drawing library raises, the run is over and its result stands
        logger.exception("the report could not be written")
        with suppress(OSError):  # a full disk is in the log already
            run.event("report_failed", reason=f"{type(error).__name__}: {error}")


def finished(run: RunDir) -> list[Finished]:
    """The stages that are done. Raises `InputError` where `progress.json` is damaged."""
    path = run / "progress.json"
    if not path.exists():
        return []
    try:
        return [Finished(**record) for record in read_json(path)]
    except TypeError as error:
        raise InputError(f"{path} is no list of finished stages ({error}): put a copy back, or remove it") from None


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
        model = model or ModelState(inputs.model)
        start = starting_model(stage, index, model, run)
        outcome = _run_stage(config, _with_reward_models(stage, done, run), index, start, inputs, run, tracker)
        outcome = _with_earlier(outcome, name, run)
        if outcome.stopped:
            run.update_status(unfinished={name: {"restarts": outcome.restarts, "workers": outcome.workers}})
            raise StopRequested
        model = model if outcome.reward_model else outcome.model
        done.append(_note(name, stage.type, replace(outcome, model=model)))
        write_atomically(run / "progress.json", json.dumps([asdict(d) for d in done], indent=1))
        run.update_status(unfinished={})
        run.event("stage_ended", stage=name, seconds=outcome.seconds)


def _with_reward_models(stage: StageConfig, done: Sequence[Finished], run: RunDir) -> StageConfig:
    """An online stage whose reward models, that of its critic too, are folders, under the names of the recipe."""
    if not isinstance(stage, OnlineStage):
        return stage
    made = {d.name: d.reward_model for d in done}

    def folder(source: RewardModelSource) -> dict[str, str | None]:
        path = str(resolve_prepared(source.path, run.path)) if source.path else None
        return {"stage": None, "path": made[source.stage] if source.stage else path}

    def located(reward: RewardConfig) -> RewardConfig:
        if not isinstance(reward, ModelReward):
            return reward
        return reward.model_copy(update={"name": reward_name(reward), **folder(reward)})

    critic = stage.critic and stage.critic.model_copy(update=folder(stage.critic))
    return stage.model_copy(update={"rewards": [located(reward) for reward in stage.rewards], "critic": critic})


def _run_stage(
    config: RunConfig, stage: StageConfig, index: int, model: ModelState, inputs: Inputs, run: RunDir, tracker: Tracker
) -> StageOutcome:
    name, given = stage_name(stage), inputs.stages[index]
    if isinstance(stage, OnlineStage):
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
        held_out=given.held_out.proof.require() if given.held_out else (),
        seed=config.seed,
        run_dir=run,
        init_random=index == 0 and config.model.init == "random",
        wait_seconds=config.cluster.wait_seconds,
    )


def _with_earlier(outcome: StageOutcome, name: str, run: RunDir) -> StageOutcome:
    """The outcome with the restarts and workers of the stage's earlier attempts, which ended in a stop."""
    earlier = run.status().get("unfinished", {}).get(name)
    if earlier is None:
        return outcome
    low, high = earlier["workers"]
    workers = (min(low, outcome.workers[0]), max(high, outcome.workers[1]))
    return replace(outcome, restarts=outcome.restarts + earlier["restarts"], workers=workers)


def _note(name: str, kind: str, outcome: StageOutcome) -> Finished:
    adapter, made = outcome.model.adapter, outcome.reward_model
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
        digest=adapter.name if adapter and not made else base_digest(made or outcome.model.base),
        reward_model=str(made) if made else None,
    )
