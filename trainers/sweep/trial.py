"""One trial of a sweep: a run in a process of its own, whose metrics Ray Tune is told of as they come."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ...cluster.processes import end_with
from ...cluster.rundir import RunDir
from .space import override

_LOOK_SECONDS = 0.2
_END_SECONDS = 90.0
"""How long a run that is ended early has for its checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all trials of a sweep have in common."""

    recipe: str
    storage: str
    overrides: tuple[str, ...]
    address: str
    """Of the cluster that the runs join."""
    stage: str
    metric: str
    """Which of that stage's metrics is compared."""


class Trial(tune.Trainable):
    """Config: the values of the sweep's keys, and `job`. A result a line of metrics: the metric, `step` and `run`.

    A trial that Ray Tune ends early is asked to stop as by Ctrl-C: its run keeps a checkpoint and can be resumed.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the run, or go on with it where it was begun before."""
        self._job: Job = config["job"]
        self._run = RunDir(Path(self._job.storage) / f"trial-{self.trial_id.rsplit('_', 1)[-1]}")
        values = [override(key, value) for key, value in config.items() if key != "job"]
        self._run.path.parent.mkdir(parents=True, exist_ok=True)
        self._told = 0
        self._last: dict[str, Any] = {}
        parent = os.getpid()
        with (self._run.path.parent / f"{self._run.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(values),
                env=_environment(self._job.address),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: end_with(parent),
            )

    def _command(self, values: list[str]) -> list[str]:
        job = self._job
        sets = [part for text in (*job.overrides, *values) for part in ("--set", text)]
        command = [sys.executable, "-m", "raylign.cli", "run", job.recipe, "--resume"]
        return [*command, "--name", self._run.name, "--storage", job.storage, "--address", job.address, *sets]

    def step(self) -> dict[str, Any]:
        """The next line of metrics, or the last one with `done` once the run has ended. Raises where it failed."""
        while True:
            ended = self._process.poll() is not None  # asked before the last look, so that nothing is missed
            if line := self._next():
                self._last = {self._job.metric: line[self._job.metric], "step": line["step"], "run": self._run.name}
                return self._last
            if ended:
                return self._end()
            time.sleep(_LOOK_SECONDS)

    def _next(self) -> dict[str, Any] | None:
        lines = [m for m in self._run.all_metrics() if m["stage"] == self._job.stage and self._job.metric in m]
        if self._told >= len(lines):
            return None
        self._told += 1
        return lines[self._told - 1]

    def _end(self) -> dict[str, Any]:
        if self._process.returncode:
            log = self._run.path.parent / f"{self._run.name}.log"
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"run {self._run.name} failed: {self._run.status().get('reason') or said[-1:] or log}")
        if not self._last:
            raise RuntimeError(f"stage {self._job.stage} of run {self._run.name} has no metric {self._job.metric!r}")
        return self._last | {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """How far Ray Tune was told: the rest is the run's own to keep."""
        return {"told": self._told, "last": self._last}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on telling from there."""
        if checkpoint:
            self._told, self._last = checkpoint["told"], checkpoint["last"]

    def cleanup(self) -> None:
        """End the run if it goes on: checkpoint, then the processes."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _environment(address: str) -> dict[str, str]:
    """This actor's, without what Ray sets for its own workers: the run is a driver of its own."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith("RAY_AUTH")}
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        mine.pop(name, None)
    return mine | {"RAY_ADDRESS": address}
