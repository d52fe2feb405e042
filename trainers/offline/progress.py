"""The callback of a training worker: metrics, checkpoints, and the end that a user asks for."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, report
from transformers import TrainerCallback

from ...cluster.rundir import RunDir
from .manifests import free_name, write_manifest
from .stage import TrainJob
from .worker import agreed, workers

_TICK_SECONDS = 0.5
"""How often rank 0 tells the run directory where it is and asks it whether to stop."""


class Progress(TrainerCallback):
    """Rank 0 writes a line of metrics a step; all ranks report checkpoints to Ray Train and leave at the same step.

    `tokens` are those each step reads, and `order` the rows of all steps, counted from 0. `error` says afterwards why
    training cannot go on, if it cannot.
    """

    def __init__(self, job: TrainJob, run: RunDir, rank: int, tokens: list[int], order: list[int]) -> None:
        self.error: str | None = None
        self._job, self._run, self._rank, self._tokens, self._order = job, run, rank, tokens, order
        self._next_tick = 0.0
        self._last: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End early, with a checkpoint, where a user asked for it."""
        stop = self._rank == 0 and self._tick(state.global_step)
        if agreed(stop, args.device) and state.global_step < self._job.steps:
            control.should_save = control.should_training_stop = True

    def _tick(self, step: int) -> bool:
        """Say where the stage is; whether it is asked to stop."""
        if time.monotonic() < self._next_tick and step < self._job.steps:
            return False
        self._next_tick = time.monotonic() + _TICK_SECONDS
        where = {"stage": self._job.name, "step": step, "steps": self._job.steps}
        self._run.update_status(**where, workers={"train": workers()}, metrics=self._last)
        return bool(self._run.desired().get("stop"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Write the step's metrics. A loss that is no number ends training: another try would give the same."""
        if "loss" not in logs:
            return
        step, loss, norm = state.global_step, logs["loss"], logs["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.error = (
                f"step {step} gave a loss of {loss} and a gradient of {norm} on data rows {self._rows_of(step)}: lower "
                "learning_rate, or look at these rows"
            )
            control.should_training_stop, control.should_save = True, False
            return
        kept = {k: v for k, v in logs.items() if k not in ("epoch", "num_tokens")}
        self._last = kept | {"tokens": self._tokens[step - 1], "workers/train": float(workers())}
        if self._rank == 0:
            self._run.metrics(self._job.name, step, self._last)

    def _rows_of(self, step: int) -> str:
        """The step's rows as the data file counts them, from 1."""
        size = self._job.stage.batch_size
        rows = [str(row + 1) for row in sorted(set(self._order[(step - 1) * size : step * size]))]
        return ", ".join(rows[:32]) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand the checkpoint to Ray Train: each rank its part, which Ray lays together on the run's storage."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_manifest(folder, self._rank, workers())
        name = free_name(self._job.checkpoints, state.global_step)  # Ray Train takes that of rank 0
        report({"step": state.global_step}, Checkpoint.from_directory(folder), checkpoint_dir_name=name)
        shutil.rmtree(folder)
