"""The trackers that a recipe asks for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import TrackingConfig
from .tracker import Tracker, Trackers


def open_tracker(config: TrackingConfig, run_dir: Path, name: str, recipe: Mapping[str, Any]) -> Trackers:
    """What takes a run's metrics. W&B writes to `<run_dir>/wandb`, trackio to `<run_dir>/trackio`; a resumed run goes
    on under the same id.

    Raises `InputError` where one refuses to start (W&B online without a key or a connection, say).
    """
    return Trackers(*_asked(config, run_dir, name, recipe))


def _asked(config: TrackingConfig, run_dir: Path, name: str, recipe: Mapping[str, Any]) -> Iterator[Tracker]:
    if config.wandb != "off":
        from .wandb import WandbTracker

        yield WandbTracker(config, run_dir / "wandb", name, recipe)
    if config.trackio:
        from .trackio import TrackioTracker

        yield TrackioTracker(config.project, run_dir / "trackio", name, recipe)
    if config.prometheus:
        from .prometheus import PrometheusTracker

        yield PrometheusTracker(name)
