"""Weights & Biases: what one run sends or keeps for `wandb sync`.

Tracking never ends a run: where it breaks down midway, one warning says so and `metrics.jsonl` has the rest.
"""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError
from ..config import TrackingConfig

logger = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run: no console capture, no code, no machine facts; offline without any network attempt.

    W&B runs a service process of its own; `finish` ends it, and it ends by itself when this process dies.
    """

    def __init__(self, config: TrackingConfig, folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._steps: set[str] = set()
        self._broken = False
        with _service_environment(folder):
            self._run = _init(config, folder, name, recipe)

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Note a step's metrics."""
        if self._broken:
            return
        prefix = f"{stage}/" if stage else ""
        try:
            self._define(prefix)
            self._run.log({f"{prefix}step": step, **{f"{prefix}{key}": value for key, value in metrics.items()}})
        except _breakdowns() as error:
            self._give_up(error)

    def finish(self) -> None:
        """Write everything out and end W&B's service process."""
        import wandb

        try:
            if not self._broken:
                self._run.finish()
        except _breakdowns() as error:
            self._give_up(error)
        try:
            wandb.teardown()
        except SystemExit as error:  # W&B leaves the whole program with its service's exit code
            self._give_up(error)
        except _breakdowns() as error:
            self._give_up(error)

    def _define(self, prefix: str) -> None:
        """Draw a stage's metrics over its own steps: W&B's own step may not begin again."""
        if prefix not in self._steps:
            self._steps.add(prefix)
            self._run.define_metric(f"{prefix}step", hidden=True)
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def _give_up(self, error: BaseException) -> None:
        if not self._broken:
            logger.warning("W&B stopped (%s: %s); metrics.jsonl goes on", type(error).__name__, error)
        self._broken = True


def _init(config: TrackingConfig, folder: Path, name: str, recipe: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        mode=config.wandb if config.wandb != "off" else "disabled",
        silent=config.wandb == "offline",
        quiet=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
    )
    try:
        return wandb.init(
            project=config.project,
            name=name,
            id=_run_id(folder),
            resume="allow" if config.wandb == "online" else None,
            dir=folder.parent,
            config=dict(recipe),
            settings=settings,
            reinit="create_new",
        )
    except (wandb.Error, OSError) as error:
        wandb.teardown()
        reason = " ".join(str(error).split())
        raise InputError(
            f"tracking.wandb {config.wandb}: W&B does not start: {reason}; offline needs no key"
        ) from error


def _run_id(folder: Path) -> str:
    """The run's id, made once: `wandb sync` then joins what was written before and after a resume."""
    path = folder / "id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


@contextmanager
def _service_environment(folder: Path) -> Iterator[None]:
    """While the service starts: its logs go to the run, and it neither reports to its makers nor advertises.

    This can only be said in the environment; without the reporting switch it looks up a host even offline.
    """
    wanted = {
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DISABLE_WEAVE": "true",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _breakdowns() -> tuple[type[Exception], ...]:
    """What W&B raises when its service is gone or refuses."""
    import wandb

    return (wandb.Error, OSError)
