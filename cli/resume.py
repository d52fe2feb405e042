"""`raylign resume`: go on with a run that was stopped or failed."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import answer, notes, print_json
from .run import JsonOption, MaxHoursOption, StorageOption, go, when

if TYPE_CHECKING:
    from ..cluster.rundir import RunDir

_SILENT_SECONDS = 60.0
"""A run that works says so twice a second; one of another machine that has not for so long is taken for gone."""


def resume(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    address: Annotated[
        str | None, typer.Option(help="Another cluster: host:port, or its jobs URL to go on there as a job.")
    ] = None,
    max_hours: MaxHoursOption = None,
    json: JsonOption = False,
) -> None:
    """Go on with a run from its last checkpoint; what is finished is not done again.

    It goes on here, on a cluster, or as a job of one, wherever the run's storage is reached.

    Example: raylign resume quickstart --address http://127.0.0.1:8265
    """
    from ..cluster.rundir import RunDir
    from ..trainers.recipe import load_recipe

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    _refuse_at_work(directory)
    if address and address.startswith(("http://", "https://")):
        return _as_job(directory, address, max_hours, json=json)
    overrides = [f"cluster.address={address}"] if address else []
    overrides += when(None, None, max_hours)
    go(load_recipe(directory / "recipe.yaml", overrides), directory, json=json)


def _refuse_at_work(directory: "RunDir") -> None:
    """Raise `InputError` for a run that another machine works on, which this one's locks know nothing of."""
    from ..cluster.rundir import AT_WORK, running_already

    state = directory.status()
    heard = time.time() - state.get("updated", 0.0)
    if state.get("status") in AT_WORK and not directory.lost() and heard < _SILENT_SECONDS:
        raise running_already(directory)


def _as_job(directory: "RunDir", address: str, max_hours: float | None, *, json: bool) -> None:
    from ..cluster.jobs import Jobs
    from ..cluster.submission import Submission, job_storage, resume_entrypoint

    place = job_storage(str(directory.path.parent), address)
    jobs = Jobs(address)
    job, new = jobs.submit(directory.name, resume_entrypoint(directory.name, place, max_hours))
    attempts = tuple(a.submission_id for a in jobs.attempts(directory.name))
    Submission(directory.name, jobs.address, job.submission_id, attempts, place).save()
    if json:
        print_json({"run": directory.name, "submission_id": job.submission_id, "new": new, "address": address})
        return
    if not new:
        notes.print(f"{directory.name} {'has succeeded' if job.final else 'is running'} there already", highlight=False)
    notes.print(f"follow it: raylign logs {directory.argument} -f", highlight=False)
    answer.print(directory.name, highlight=False)
