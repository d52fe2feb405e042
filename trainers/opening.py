"""Open a run's directory, new or again, before anything heavy is imported: the run's supervisor does it."""

from pathlib import Path

from ..cluster.errors import InputError
from ..cluster.rundir import RunDir, refuse_reserved, running_already, write_atomically
from .changes import refuse_changes
from .config import RunConfig
from .recipe import dump_recipe, load_recipe


def open_run(config: RunConfig, storage: Path, *, named: bool, resume: bool) -> RunDir:
    """The run's directory, with its recipe in it.

    A name that is taken is an `InputError`, unless it is only the recipe's own: then the run takes the next free one
    (`quickstart-2`), so that nothing is overwritten. With `resume` a run of that name goes on; a recipe that asks for
    another result than it began with is an `InputError`, and so is a folder of that name that is no run's.
    """
    refuse_reserved(config.name)
    storage = storage.resolve()
    run = RunDir(storage / config.name)
    if resume and (run / "recipe.yaml").exists():
        _refuse_another(config, run)
    elif not _claim(run):
        if resume or named:
            _refuse_taken(run, resume=resume)
        else:
            run = next(r for n in range(2, 10_000) if _claim(r := RunDir(storage / f"{config.name}-{n}")))
    write_atomically(run / "recipe.yaml", dump_recipe(config.model_copy(update={"name": run.name})))
    return run


def _claim(run: RunDir) -> bool:
    """Make the directory of a run; false where it is there already, so that two commands never get the same."""
    try:
        run.path.mkdir(parents=True)
        run.created = True
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"cannot write runs to {run.path.parent}: {error.strerror}: give another --storage") from None
    return True


def _refuse_taken(run: RunDir, *, resume: bool) -> None:
    """Raise `InputError` for a folder that is there already; an empty one may be taken with `resume`."""
    if (run / "recipe.yaml").exists():
        status = run.status().get("status", "not begun")
        raise InputError(
            f"run {run.name!r} exists in {run.path.parent} ({status}): `raylign resume {run.argument}` goes on "
            "with it, or take another --name"
        )
    if not resume or any(run.path.iterdir()):
        raise InputError(
            f"{run.path} is there and is no run's: it has no recipe.yaml; take another --name or --storage"
        )


def _refuse_another(config: RunConfig, run: RunDir) -> None:
    """Raise `InputError` where a run is at work now, or began with a recipe that gives another result."""
    if run.held():
        raise running_already(run)
    if run.status():
        refuse_changes(load_recipe(run / "recipe.yaml"), config)
