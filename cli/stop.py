"""`raylign stop`: end a run early, keeping everything it has done."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption

if TYPE_CHECKING:
    from ..cluster.rundir import RunDir
    from ..cluster.submission import Submission

_LOOK_EVERY_SECONDS = 0.3


def stop(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for its end; 0 does not wait.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Ask a run to checkpoint, drain and end, and wait until it has.

    Example: raylign stop quickstart
    """
    from ..cluster.rundir import RunDir
    from ..cluster.submission import Submission

    root = (storage or Path("runs")).resolve()
    submission = Submission.load(root, run)
    if submission and not (root / run / "recipe.yaml").exists():
        facts = {"run": run, "status": _stop_job(submission, timeout), "step": None}
    else:
        status = _stop_run(RunDir.find(root, run), timeout)
        facts = {"run": run, "status": status.get("status"), "step": status.get("step")}
    print_json(facts) if json else answer.print(f"{run}: {facts['status']}", highlight=False)


def _stop_run(directory: "RunDir", timeout: float) -> dict[str, Any]:
    """Ask a run to stop and wait; its last status. Raises `RunFailed` where it does not end or nobody is there to."""
    from ..cluster.errors import RunFailed
    from ..cluster.rundir import FINAL

    status = directory.status()
    if status.get("status") in FINAL:
        return status
    if not directory.lost():
        directory.desire(stop=True)
        notes.print("waiting for the checkpoint", highlight=False)
        deadline = time.monotonic() + timeout
        while status.get("status") not in FINAL and not directory.lost() and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_SECONDS)
            status = directory.status()
    if directory.lost():
        raise RunFailed(
            f"run {directory.name!r} is lost, its process is gone, so there is nothing to stop: "
            f"`raylign resume {directory.argument}` goes on from the last checkpoint"
        )
    if timeout and status.get("status") not in FINAL:
        raise RunFailed(
            f"{directory.name} did not end within {timeout:g} s: `raylign status {directory.argument}` says where it is"
        )
    return status


def _stop_job(submission: "Submission", timeout: float) -> str:
    """Stop a job whose run has no directory yet, since it waits for a place; how it then stands."""
    from ..cluster.errors import RunFailed
    from ..cluster.jobs import Jobs

    jobs = Jobs(submission.address)
    jobs.stop(submission.submission_id)
    deadline = time.monotonic() + timeout
    while not (job := jobs.status(submission.submission_id)).final and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_SECONDS)
    if timeout and not job.final:
        raise RunFailed(f"the job of {submission.run} at {submission.address} did not end within {timeout:g} s")
    return job.status
