"""`raylign report`: one HTML file of what a run did so far."""

from pathlib import Path
from typing import Annotated

import typer

from .output import answer, print_json
from .run import JsonOption, StorageOption


def report(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Write a run's report.html from what it has left, also while it goes on or after it failed.

    Example: raylign report quickstart
    """
    from ..cluster.rundir import RunDir
    from ..trainers.report.build import write_report

    path = write_report(RunDir.find((storage or Path("runs")).resolve(), run))
    print_json({"run": run, "report": str(path)}) if json else answer.print(str(path), highlight=False)
