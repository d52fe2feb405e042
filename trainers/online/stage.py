"""An online stage from the model it starts with to the model it leaves: actors up, loop, actors down."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from ...cluster import calls
from ...cluster.rundir import RunDir
from ...cluster.weights import ObjectStore, base_digest, save_adapter, tensors_of
from ...rollout.places import Places
from ...rollout.pool import RolloutPool
from ...rollout.worker import WorkerSpec
from ..adapters import open_base, save_model
from ..config import RunConfig, stage_name
from ..data.inputs import StageInput
from ..data.template import Encoded, Tokenizer, stop_tokens
from ..model_state import ModelState, StageOutcome
from ..stages import OnlineStage
from ..stages.wishes import role_demands
from .actors import END_SECONDS
from .ahead import Prompt
from .held_out import HeldOut
from .loop import OnlineLoop
from .policy import PolicySpec
from .roles import Roles


def run_online_stage(
    config: RunConfig,
    stage: OnlineStage,
    index: int,
    model: ModelState,
    given: StageInput,
    tokenizer: Tokenizer,
    run: RunDir,
    on_metrics: Callable[[int, dict[str, float]], None],
) -> StageOutcome:
    """Train with separate policy, reference, critic, reward and rollout actors; ends them whatever happens.

    `model` is what `starting_model` gave.
    """
    began = time.time()
    name = stage_name(stage)
    digest = base_digest(model.base)
    spec = PolicySpec(
        base=model.base,
        base_digest=digest,
        adapter=model.adapter,
        stage=stage,
        seed=config.seed,
        dtype=config.model.dtype,
    )
    worker = WorkerSpec(
        base=model.base,
        dtype=config.model.dtype,
        config=stage.rollout,
        seed=config.seed,
        max_length=stage.rollout.max_prompt_tokens + stage.rollout.sampling.max_tokens,
        stop_token_ids=tuple(sorted(stop_tokens(tokenizer))),
    )
    calls.wait_until_gone(f"{run.name}/{name}", timeout=END_SECONDS)  # of a controller that died
    prefix = f"{run.name}/{name}/"
    wait = config.cluster.wait_seconds
    places = Places(role_demands(stage.roles), least=stage.rollout.workers.min)
    pool = RolloutPool(prefix=prefix, spec=worker, wait_seconds=wait, note=run.event, places=places)
    roles = Roles(
        prefix,
        spec,
        stage,
        places,
        samples=run / "samples" / name,
        wait_seconds=wait,
        inbox=pool.inbox,
        note=run.event,
    )
    loop = OnlineLoop(
        stage,
        name,
        prompts=_prompts(given),
        roles=roles,
        pool=pool,
        run=run,
        checkpoints=run / "checkpoints" / f"{index}-{name}",
        seed=config.seed,
        on_metrics=on_metrics,
        held_out=HeldOut(stage, _prompts(given.held_out), pool, roles) if given.held_out else None,
    )
    with ExitStack() as actors:
        actors.callback(roles.close)
        actors.callback(pool.close)
        loop.run()
        left = model if loop.stopped else _keep(loop, model, run, index, stage, digest)
    return StageOutcome(
        model=left,
        metrics=loop.last_metrics,
        steps=loop.step,
        seconds=time.time() - began,
        stopped=loop.stopped,
        restarts=pool.restarts + loop.restarts,
        version=loop.version,
        workers=loop.workers_seen,
    )


def _prompts(given: StageInput) -> list[Prompt]:
    """The proven prompts with their rows; their tokens are those of the proof."""
    proven = zip(given.proof.require(), given.rows, strict=True)
    return [_prompt(e, row) for e, row in proven if isinstance(e, Encoded)]


def _prompt(encoded: Encoded, row: dict[str, Any]) -> Prompt:
    ids = np.array(encoded.input_ids, np.int32)
    if not encoded.spans:
        return Prompt(ids=ids, row=row)
    ((start, end),) = encoded.spans
    return Prompt(ids=ids[:start], row=row, answer=ids[start:end])


def _keep(loop: OnlineLoop, model: ModelState, run: RunDir, index: int, stage: OnlineStage, digest: str) -> ModelState:
    """The last published weights as a folder: an adapter under its digest, or a whole model."""
    weights, name = loop.weights, stage_name(stage)
    tensors = tensors_of(ObjectStore().receive(weights.parcel, "the run", timeout=stage.timeout_seconds))
    provenance = {"base_digest": digest, "run": run.name, "stage": name, "steps": loop.step}
    if weights.config:
        _, folder = save_adapter(run / "adapters", tensors, weights.config, provenance)
        return ModelState(model.base, folder)
    import torch

    whole = open_base(model.base)
    with torch.no_grad():
        for key, parameter in whole.named_parameters():
            parameter.copy_(torch.tensor(tensors[key]))  # not from_numpy: read-only memory makes it warn
    return ModelState(save_model(whole, model.base, run / "models" / f"{index}-{name}"))
