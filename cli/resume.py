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
    """Go on with a run here, from its last checkpoint; what is finished is not done again.

    A job goes on in its cluster when its recipe is submitted again.

    Example: raylign resume quickstart
    """
    from ..cluster.rundir import RunDir
    from ..trainers.recipe import load_recipe

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    go(load_recipe(directory / "recipe.yaml"), directory, json=json)
