"""One data-parallel training worker of an offline stage, inside Ray Train.

Every worker sees all rows in the order of the whole run and takes its share of each step, so that the samples of a step
do not depend on the number of workers, and a resume finds its place by counting.
"""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cluster.imports import importing
from ...cluster.rundir import RunDir
from ...cluster.weights import base_digest
from ..adapters import open_model, open_reward_model, random_model, save_model, save_reward_model
from ..stages import ProcessRewardModelStage, RewardModelStage
from ..stages.adapters import served_per_row, trains_all, virtual
from ..trained import merge_trained, save_trained
from .manifests import newest_valid, step_of
from .stage import TrainJob, not_begun, row_order

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from datasets import Dataset


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker: train the job's stage, write its outcome, return where it lies.

    `config` holds the `TrainJob` as `job` and references to the tables of `rows` and `held_out` rows (or none).
    """
    import ray
    import torch
    from ray.train import get_context

    job: TrainJob = config["job"]
    began = time.time()
    torch.set_num_threads(max(1, int(job.stage.resources.cpus)))
    run, rank = RunDir(job.run_dir), get_context().get_world_rank()
    run.event("worker", role="train", stage=job.name, rank=rank, pid=os.getpid(), node=socket.gethostname())
    with tempfile.TemporaryDirectory(prefix="raylign-train-") as scratch:
        made = _train(job, ray.get(config["rows"]), ray.get(config["held_out"]), run, rank, Path(scratch))
    run.span(f"train-{rank}", job.name, began, time.time())
    return made


def _quiet() -> None:
    """Keep the libraries' progress bars and notices, one a checkpoint or import, out of the run's log."""
    import logging
    import warnings

    from ray.train.v2._internal.execution import context
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    logging.getLogger(context.__file__).setLevel(logging.WARNING)  # Ray names this logger by its file
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _train(
    job: TrainJob, rows: "pa.Table", held_out: "pa.Table | None", run: RunDir, rank: int, scratch: Path
) -> dict[str, Any]:
    _quiet()
    checkpoint = _checkpoint(run, rank)
    at = step_of(checkpoint) if checkpoint else 0
    if _stop_asked(run, rank):
        return not_begun(job, at)
    with importing():
        from .hf_trainer import make_trainer
        from .progress import Progress

    order = row_order(job.seed, rows.num_rows, job.stage.batch_size, job.steps)
    trainer = make_trainer(job, _model(job), _in_order(rows, order), scratch)
    progress = Progress(job, run, rank, _tokens_of_steps(rows, order, job.steps), order)
    trainer.add_callback(progress)
    if _stop_asked(run, rank):
        return not_begun(job, at)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step, adapter = int(trainer.state.global_step), job.adapter and str(job.adapter)
    made: dict[str, Any] = {"base": str(job.base), "adapter": adapter, "step": step, "error": progress.error}
    made["stopped"] = step < job.steps and not progress.error
    if rank == 0 and step == job.steps and not progress.error:
        made |= _write_outcome(job, trainer.model, held_out)
    return made


def _checkpoint(run: RunDir, rank: int) -> Path | None:
    """The newest checkpoint whose files are as they were written, if there is one."""
    from ray.train import get_checkpoint

    newest = get_checkpoint()
    if newest is None:
        return None
    found, refused = newest_valid(Path(newest.path))
    for name in refused if rank == 0 else ():
        run.event("checkpoint_refused", checkpoint=name, reason="its files do not match its manifest")
    return found


def _stop_asked(run: RunDir, rank: int) -> bool:
    """Whether the run is asked to stop before its next step; all ranks must ask at the same place."""
    from ray.train.torch import get_device

    return agreed(rank == 0 and bool(run.desired().get("stop")), get_device())


def workers() -> int:
    """How many workers there are now; a stage may have more or fewer when it goes on."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def agreed(stop: bool, device: "torch.device") -> bool:
    """Whether any rank wants to stop; a collective, so that all do at the same step."""
    import torch

    if workers() == 1:
        return stop
    flag = torch.tensor([int(stop)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _model(job: TrainJob) -> Any:
    if job.init_random:
        return random_model(job.base, seed=job.seed)
    if isinstance(job.stage, RewardModelStage | ProcessRewardModelStage):
        task = "SEQ_CLS" if isinstance(job.stage, RewardModelStage) else "TOKEN_CLS"
        return open_reward_model(job.base, job.stage.adapter, seed=job.seed, task=task, steps=job.steps)
    return open_model(job.base, job.adapter, job.stage.adapter, seed=job.seed, steps=job.steps)


def _write_outcome(job: TrainJob, model: Any, held_out: "pa.Table | None") -> dict[str, Any]:
    """Save what the stage made: an adapter under its digest, a model folder, or a reward model's with its measure."""
    if isinstance(job.stage, RewardModelStage | ProcessRewardModelStage):
        folder = save_reward_model(model, job.base, job.model_out)
        return {"reward_model": str(folder), "metrics": _measured(folder, held_out)}
    own = job.stage.adapter
    if trains_all(own) and not job.adapter:
        return {"base": str(save_model(model, job.base, job.model_out))}
    provenance = {"base_digest": base_digest(job.base), "stage": job.name, "steps": job.steps, "seed": job.seed}
    folder = save_trained(model, own, job.run_dir / "adapters", provenance)
    if own is None or served_per_row(own) or virtual(own):
        return {"adapter": str(folder)}
    return {"base": str(merge_trained(job.base, folder, job.model_out)), "adapter": None}


def _measured(folder: Path, held_out: "pa.Table | None") -> dict[str, float]:
    from ray.train.torch import get_device

    from .measure import measure

    if held_out is None:
        return {}
    return {f"held_out/{name}": value for name, value in measure(folder, held_out, str(get_device())).items()}


def _in_order(rows: "pa.Table", order: list[int]) -> "Dataset":
    """The rows of all steps, one after the other."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # Given fingerprints: datasets would hash the whole table for its cache, which nothing here uses.
    dataset = Dataset(InMemoryTable(rows), fingerprint="rows")
    return dataset.select(order, new_fingerprint="rows-in-order")


def _tokens_of_steps(rows: "pa.Table", order: list[int], steps: int) -> list[int]:
    """Tokens each step reads; a pair's prompt is read twice."""
    import numpy as np
    import pyarrow.compute as pc

    names = [name for name in rows.column_names if name not in ("labels", "label")]
    lengths = {n: np.asarray(pc.call_function("list_value_length", [rows[n]])) for n in names}
    parts = [*lengths.values(), *([lengths["prompt_ids"]] if "rejected_ids" in lengths else [])]
    each = np.stack(parts).sum(axis=0, dtype=np.int64)
    return each[order].reshape(steps, -1).sum(axis=1).tolist()
