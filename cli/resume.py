"""`raylign resume`: go on with a run that was stopped or failed."""

from pathlib import Path
from typing import Annotated

import typer

from .run import JsonOption, StorageOption, go


def resume(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Go on with a run from its last checkpoint; what is finished is not done again.

    Example: raylign resume quickstart
    """
    from ..cluster.errors import InputError
    from ..cluster.rundir import RunDir
    from ..cluster.submission import Submission
    from ..trainers.recipe import load_recipe

    root = (storage or Path("runs")).resolve()
    directory = RunDir.find(root, run)
    if Submission.load(root, run):
        raise InputError(
            f"run {run!r} was submitted as a job: submit its recipe again (`raylign submit RECIPE --name {run}`), "
            "it goes on from its last checkpoint there"
        )
    go(load_recipe(directory / "recipe.yaml"), directory, json=json)
