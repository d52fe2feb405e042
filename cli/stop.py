"""`raylign stop`: end a run early, keeping everything it has done."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption


def stop(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for its end; 0 does not wait.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Ask a run to checkpoint, drain and end, and wait until it has.

    Example: raylign stop quickstart
    """
    from ..cluster.errors import RunFailed
    from ..cluster.rundir import FINAL, RunDir

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    status = directory.status()
    if status.get("status") not in FINAL:
        directory.desire(stop=True)
        deadline = time.monotonic() + timeout
        notes.print("waiting for the checkpoint", highlight=False)
        while status.get("status") not in FINAL and time.monotonic() < deadline:
            time.sleep(0.3)
            status = directory.status()
        if timeout and status.get("status") not in FINAL:
            raise RunFailed(f"{run} did not end within {timeout:.0f} s: `raylign status {run}` says where it is")
    facts = {"run": run, "status": status.get("status"), "step": status.get("step")}
    print_json(facts) if json else answer.print(f"{run}: {facts['status']}", highlight=False)
