"""The model that a command is given: a folder, or what a run's last stage left."""

from pathlib import Path

from ..cluster.errors import InputError
from ..cluster.rundir import RunDir
from .model_state import ModelState
from .pipeline import finished


def model_of(place: Path, adapter: Path | None, storage: Path) -> ModelState:
    """A model folder with an adapter on it, or a run by its name, which says itself which adapter that is.

    Raises `NotFound` where there is neither, and `InputError` for a run without a finished stage or an adapter beside a
    run.
    """
    if place.is_dir():
        return ModelState(place, adapter)
    run = RunDir.find(storage, str(place))
    if adapter:
        raise InputError(f"--adapter {adapter}: run {run.name} has its own; give a model folder to choose another")
    done = finished(run)
    if not done:
        raise InputError(f"run {run.name} has no finished stage yet: it left no model")
    return ModelState(Path(done[-1].base), Path(done[-1].adapter) if done[-1].adapter else None)
