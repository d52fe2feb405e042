"""The end of a run: register what it made, serve it, ask it the held-out questions, and give it the recipe's alias."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.errors import NotFound, RaylignError
from ..cluster.rundir import RunDir
from ..rollout.rewards.process import BoundedReward
from ..serve import deploy
from ..serve.aliases import Move
from ..serve.registry import Registry
from .config import EvaluationConfig, RunConfig
from .data.inputs import Inputs
from .evaluation import evaluate
from .forgetting import ALARM, evaluate_on_ray
from .gate import Verdict, digest_of, judge, judge_forgetting, questions_digest
from .interrupt import stop_if_asked

if TYPE_CHECKING:
    from .pipeline import Finished

_MEASURE_SECONDS = 300.0
"""How long losses on a few sentences may take, with the loading of the model."""


def publish(config: RunConfig, run: RunDir, stages: "Sequence[Finished]", inputs: Inputs | None = None) -> list[str]:
    """Register the base and every adapter on it under names of the run: `<run>-base`, `<run>-<stage>`, in order.

    Each entry says where it came from: run, recipe, data, steps and metrics of its stage, and the model before it.
    """
    registry = Registry(registry_root(run))
    came = {"run": run.name, "recipe": digest_of(config.model_dump(mode="json"))}
    base = registry.register_base(Path(stages[-1].base), came)
    names = [f"{run.name}-base"]
    registry.promote(names[0], base.digest)
    last = base
    for index, stage in enumerate(stages):
        if stage.adapter and stage.base == stages[-1].base and not stage.reward_model:
            provenance = came | {
                "stage": stage.name,
                "steps": stage.steps,
                "metrics": stage.metrics,
                "parent": last.digest,
                "data": digest_of(inputs.stages[index].rows) if inputs else None,
            }
            last = registry.publish(Path(stage.adapter), base, provenance)
            names.append(f"{run.name}-{stage.name}")
            registry.promote(names[-1], last.digest)
    run.event("published", models=names, digest=last.digest)
    return names


def promote(
    config: RunConfig, run: RunDir, model: str, evaluation: dict[str, Any], questions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Point the recipe's alias at the run's last `model`, unless the evaluation speaks against it.

    Gives `alias`, `digest`, `promoted` and `why`. A model that does not pass changes nothing: the old one answers on.
    """
    assert config.serve is not None, "only a run that serves promotes"
    registry, alias = Registry(registry_root(run)), config.serve.alias
    digest = registry.resolve(model).digest
    verdict, seen = Verdict(passed=True, why="the recipe has no evaluation"), {}
    if config.evaluation and evaluation:
        asked = questions_digest(questions, config.evaluation, config.seed)
        seen = {"questions": asked, "scores": evaluation["after"]}
        verdict = judge(
            evaluation["after"], evaluation["before"], _incumbent(registry, alias), asked, config.serve.tolerance
        )
    if verdict.passed and config.serve.max_forgetting is not None:
        kept = judge_forgetting(evaluation.get("forgetting"), config.serve.max_forgetting)
        verdict = Verdict(passed=kept.passed, why=f"{verdict.why}; {kept.why}" if kept.passed else kept.why)
    if verdict.passed:
        registry.promote(alias, digest, why=f"run {run.name}: {verdict.why}", evaluation=seen)
    run.event("promoted" if verdict.passed else "not_promoted", alias=alias, digest=digest, why=verdict.why)
    return {"alias": alias, "digest": digest, "promoted": verdict.passed, "why": verdict.why}


def _incumbent(registry: Registry, alias: str) -> Move | None:
    try:
        return registry.alias(alias).now
    except NotFound:
        return None


def registry_root(run: RunDir) -> Path:
    """The registry that all runs of a storage share."""
    return run.path.parent / "registry"


def measure_forgetting(config: RunConfig, run: RunDir, last: "Finished") -> dict[str, Any]:
    """How much the loss on general text rose with the adapter that a run ends with, as `forgetting`; from `ALARM` on it
    is an alarm. Empty where no adapter lies on the base, or it could not be measured, which changes no result."""
    assert config.serve is not None, "only a run that serves measures"
    if not last.adapter:
        return {}
    resources, seconds = config.serve.resources, config.cluster.wait_seconds + _MEASURE_SECONDS
    try:
        found = evaluate_on_ray(
            Path(last.base), Path(last.adapter), resources, timeout=seconds, tick=lambda: stop_if_asked(run)
        )
    except RaylignError as error:
        run.event("forgetting_not_measured", reason=str(error))
        return {}
    if found["forgetting"] > ALARM:
        saw = f"the loss on general text rose by {found['forgetting']:.3f} nats a token"
        tries = "a lower learning rate, fewer steps, or general rows in the data (mixture)"
        run.event("alarm", stage=last.name, step=last.steps, alarm="forgetting", saw=saw, **{"try": tries})
    return {"forgetting": found["forgetting"]}


def serve_and_evaluate(
    config: RunConfig, run: RunDir, inputs: Inputs, names: Sequence[str], say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Start the service, ask it as every model, stop it. Returns where it was and the evaluation."""
    assert config.serve is not None, "only a run that serves comes here"
    say("serving")
    base = Path(Registry(registry_root(run)).resolve(names[0]).path)
    url = deploy.start(
        config.serve,
        name=run.name,
        base=base,
        registry=registry_root(run),
        dtype=config.model.dtype,
        tick=lambda: stop_if_asked(run),
    )
    try:
        evaluation = (
            _evaluate(config.evaluation, run, config.seed, inputs, url, names, say) if config.evaluation else {}
        )
    finally:
        deploy.stop(run.name)
    return url, evaluation


def _evaluate(
    evaluation: EvaluationConfig,
    run: RunDir,
    seed: int,
    inputs: Inputs,
    url: str,
    names: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracy of every model at every temperature; `before` is the model the last stage began with.

    `errors`, where a model has it, counts answers that could not be had or graded; they count as wrong.
    """
    models: dict[str, dict[str, Any]] = {}
    with BoundedReward(evaluation.rewards[0], Path("/")) as reward:
        for name in names:
            say(f"asking {name}")
            models[name] = {"n": len(inputs.evaluation)}
            for temperature in evaluation.temperatures:
                asked = evaluate(
                    url,
                    name,
                    inputs.evaluation,
                    grade=reward.score,
                    temperature=temperature,
                    max_tokens=evaluation.max_tokens,
                    concurrency=evaluation.concurrency,
                    seed=seed,
                    tick=lambda: stop_if_asked(run),
                )
                models[name][_label(temperature)] = asked["accuracy"]
                if asked["errors"]:
                    models[name]["errors"] = models[name].get("errors", 0) + asked["errors"]
                models[name].setdefault("examples", asked["examples"][:3])
    return {
        "before": _scores(models[names[-2 if len(names) > 1 else -1]]),
        "after": _scores(models[names[-1]]),
        "models": models,
    }


def _label(temperature: float) -> str:
    """`greedy` for 0, else `t1`, `t0.7`."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def _scores(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "examples"}
