"""The stages on Ray Train: continued pre-training, fine-tuning, distillation, preferences, reward models.

The driver's half: it settles which rows each step takes and where the outcome goes; the workers (train_worker.py)
train. Ray Train restarts them from the last checkpoint when one dies, and finds the same checkpoint when a later
process runs the stage again.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cluster.errors import DoesNotFit, RunFailed
from ...cluster.placement import free_offers, place, release
from ...cluster.planning import amount
from ...cluster.rundir import RunDir
from ..config import stage_name
from ..data.proof import EncodedRow
from ..data.template import Encoded, EncodedAnswer
from ..model_state import ModelState, StageOutcome
from ..recipe import resolve_prepared
from ..schedule import rows_drawn
from ..stages import DistillStage, OfflineStage

if TYPE_CHECKING:
    import pyarrow as pa

_POLL = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
"""How often Ray Train's controller looks at its workers. A report waits for that look; at the default of 2 s ten
checkpoints cost 20 s."""

_RESIZE_SECONDS = 10.0
"""How often Ray Train looks whether there is room for more workers, or less than there was."""

_DECIDE_SECONDS = 15.0
"""How long workers of an elastic group may lack their places before their number is decided anew: for a while Ray does
not know of a node that was lost."""

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""How long Ray Train's controller waits for the workers' places, each time it starts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """All a training worker needs besides its rows; paths are absolute and on storage that all nodes share."""

    stage: OfflineStage
    name: str
    base: Path
    adapter: Path | None
    teacher: Path | None = None
    init_random: bool
    seed: int
    steps: int
    run_dir: Path
    checkpoints: Path
    model_out: Path


def run_offline_stage(
    stage: OfflineStage,
    *,
    index: int,
    model: ModelState,
    encoded: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow] = (),
    seed: int,
    run_dir: RunDir,
    init_random: bool = False,
    wait_seconds: float = 120.0,
) -> StageOutcome:
    """Train one stage on the rows its proof encoded, on the Ray cluster this process is connected to.

    `model` is what `starting_model` gave: with its adapter training goes on, without one the stage's own is new. A
    reward model is measured on the `held_out` pairs, where there are any.
    Blocks until the stage is done or `run_dir.desired()["stop"]` ended it. Call it off the main thread, where Ray
    Train would take Ctrl-C for itself. Run again after a stop or a crash it goes on from the last checkpoint.
    Raises `InputError`, `DoesNotFit` where the workers get no place within `wait_seconds`, or `RunFailed` with the
    last checkpoint's place.
    """
    name = stage_name(stage)
    _require_room(stage, name)
    root = run_dir.path.resolve()
    job = TrainJob(
        stage=stage,
        name=name,
        base=model.base.resolve(),
        adapter=model.adapter.resolve() if model.adapter else None,
        teacher=resolve_prepared(stage.teacher.path, root) if isinstance(stage, DistillStage) else None,
        init_random=init_random,
        seed=seed,
        steps=stage.steps or math.ceil(len(encoded) / stage.batch_size),
        run_dir=root,
        checkpoints=root / "checkpoints" / f"{index}-{name}",
        model_out=root / "models" / f"{index}-{name}",
    )
    began = time.time()
    try:
        _await_room(stage, name, wait_seconds, run_dir)
        made = _fit(job, rows_table(encoded), rows_table(held_out) if held_out else None, wait_seconds)
    except DoesNotFit:
        if not run_dir.desired().get("stop"):
            raise
        made = not_begun(job)
    return StageOutcome(
        model=ModelState(Path(made["base"]), Path(made["adapter"]) if made["adapter"] else None),
        metrics=_summary(run_dir, name) | made.get("metrics", {}),
        steps=made["step"],
        seconds=time.time() - began,
        stopped=made["stopped"],
        restarts=_starts(run_dir, name, began) - 1,
        workers=_workers_seen(run_dir, name, stage.workers.max),
        reward_model=Path(made["reward_model"]) if "reward_model" in made else None,
    )


def _require_room(stage: OfflineStage, name: str) -> None:
    """Raise `DoesNotFit` where the whole cluster is too small: Ray Train would wait for ever."""
    import ray

    there = ray.cluster_resources()
    for kind, each in (("CPU", stage.resources.cpus), ("GPU", stage.resources.gpus)):
        least = stage.workers.min
        asked, have = least * each, there.get(kind, 0.0)
        if asked > have:
            raise DoesNotFit(
                f"stage {name} asks for {asked:g} {kind}s ({least} workers of {each:g}), "
                f"the cluster has {have:g}: lower workers or resources"
            )


def _await_room(stage: OfflineStage, name: str, wait_seconds: float, run_dir: RunDir) -> None:
    """Wait until every worker would get a place, or raise `DoesNotFit` with what is asked and free.

    Also raises it when the run is asked to stop: Ray Train's controller hears nothing while it waits for a place.
    """
    deadline, groups = time.monotonic() + wait_seconds, []
    try:
        for rank in range(stage.workers.min):
            role = f"train worker {rank + 1} of {stage.workers.min} of stage {name}"
            left = max(0.1, deadline - time.monotonic())
            groups.append(place(role, stage.resources, left, cancelled=lambda: bool(run_dir.desired().get("stop"))))
    finally:
        for group in groups:
            release(group)


def not_begun(job: TrainJob, step: int = 0) -> dict[str, Any]:
    """What `train_worker` returns of a stage that was asked to stop before another step."""
    adapter = str(job.adapter) if job.adapter else None
    return {"base": str(job.base), "adapter": adapter, "step": step, "error": None, "stopped": True}


def rows_table(encoded: Sequence[EncodedRow]) -> "pa.Table":
    """The rows as one Arrow table, which Ray's object store shares without a copy."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    match encoded[0]:
        case Encoded():
            names = {"input_ids": tokens, "labels": tokens}
        case EncodedAnswer():
            names = {"prompt_ids": tokens, "completion_ids": tokens, "label": pa.bool_()}
        case _:
            names = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), tokens)
    return pa.table({n: pa.array([getattr(row, n) for row in encoded], kind) for n, kind in names.items()})


def row_order(seed: int, rows: int, batch_size: int, steps: int) -> list[int]:
    """Which row stands at each place of each step; the same for any number of workers."""
    return rows_drawn(seed, rows, 0, steps * batch_size)


def _fit(job: TrainJob, rows: "pa.Table", held_out: "pa.Table | None", wait_seconds: float) -> dict[str, Any]:
    """Run the workers under Ray Train; what rank 0 returned."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from .worker import train_worker

    for key, value in _POLL.items():
        os.environ.setdefault(key, value)
    stage = job.stage
    fixed = stage.workers.min == stage.workers.max
    patience = wait_seconds if fixed else min(wait_seconds, _DECIDE_SECONDS)
    os.environ[_START_TIMEOUT] = str(patience)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "rows": ray.put(rows), "held_out": ray.put(held_out)},
        scaling_config=ScalingConfig(
            num_workers=stage.workers.min if fixed else (stage.workers.min, stage.workers.max),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=stage.resources.gpus > 0,
            resources_per_worker={"CPU": stage.resources.cpus, "GPU": stage.resources.gpus},
            label_selector=stage.resources.labels or None,
        ),
        run_config=RunConfig(
            name=job.checkpoints.name,
            storage_path=str(job.checkpoints.parent),
            failure_config=FailureConfig(
                max_failures=stage.max_failures,
                controller_failure_limit=stage.max_failures + math.ceil(wait_seconds / patience) - 1,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=stage.keep_last),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        made = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _failure(error, job) from error
    if not isinstance(made, dict):
        raise RunFailed(f"stage {job.name}: Ray Train ended without a result from rank 0")
    if made.get("error"):
        raise RunFailed(f"stage {job.name}: {made['error']}; {_last_checkpoint(job.checkpoints)}")
    return made


def _failure(error: Exception, job: TrainJob) -> RunFailed | DoesNotFit:
    """One line for a stage whose workers failed more often than allowed, or got no place again."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        each = amount(job.stage.resources.cpus, job.stage.resources.gpus)
        free = "; ".join(f"{n.node} has {amount(n.cpus, n.gpus)} free" for n in free_offers())
        return DoesNotFit(
            f"stage {job.name} asked for {job.stage.workers.min} workers of {each} and they got no place within "
            f"{os.environ[_START_TIMEOUT]} s: {free}; {_last_checkpoint(job.checkpoints)}"
        )
    failures = getattr(error, "worker_failures", None) or {}
    rank, cause = next(iter(failures.items()), (None, error))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    where = f"training worker {rank}" if rank is not None else "Ray Train"
    return RunFailed(
        f"stage {job.name}: {where} failed after {job.stage.max_failures} restarts: "
        f"{lines[-1] if lines else type(cause).__name__}; {_last_checkpoint(job.checkpoints)}"
    )


def _last_checkpoint(folder: Path) -> str:
    kept = sorted(folder.glob("step-*"))
    return f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint had been written"


def _starts(run_dir: RunDir, name: str, since: float) -> int:
    """How often the workers of a stage were started since then."""
    starts = [e for e in run_dir.events("worker") if e.get("role") == "train" and e["stage"] == name]
    return max(1, sum(e["rank"] == 0 and e["time"] >= since for e in starts))


def _workers_seen(run_dir: RunDir, name: str, most: int) -> tuple[int, int]:
    """The fewest and the most workers that a step of the stage had."""
    seen = [int(m["workers/train"]) for m in run_dir.all_metrics() if m["stage"] == name and "workers/train" in m]
    return (min(seen), max(seen)) if seen else (most, most)


def _summary(run_dir: RunDir, name: str) -> dict[str, float]:
    """The stage's last metrics and its tokens in all."""
    lines = [m for m in run_dir.all_metrics() if m["stage"] == name]
    if not lines:
        return {}
    last = {k: v for k, v in lines[-1].items() if k not in ("time", "stage", "step")}
    return last | {"first_loss": lines[0]["loss"], "tokens": sum(m.get("tokens", 0) for m in lines)}
