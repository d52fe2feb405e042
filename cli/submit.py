"""`raylign submit`: a recipe as a job of a running cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import answer, notes, print_json, write
from .run import AfterOption, JsonOption, MaxHoursOption, PriorityOption, SetOption, when

if TYPE_CHECKING:
    from ..cluster.jobs import Job
    from ..trainers.config import RunConfig


def submit(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; its folder is sent along.")],
    address: Annotated[str, typer.Option(help="The cluster's jobs URL.")] = "http://127.0.0.1:8265",
    name: Annotated[str | None, typer.Option(help="The run's name; the recipe's by default.")] = None,
    storage: Annotated[str | None, typer.Option(help="Where the run writes; ./runs on this machine.")] = None,
    set_: SetOption = None,
    wheel: Annotated[Path | None, typer.Option(help="A wheel of raylign, where the cluster has none.")] = None,
    after: AfterOption = None,
    priority: PriorityOption = None,
    max_hours: MaxHoursOption = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the log until the run ends.")] = False,
    json: JsonOption = False,
) -> None:
    """Send a recipe to a cluster and print the run's name; the run goes on when this command ends.

    A name that runs or has succeeded there is not started again. After a failure or a stop it goes on from its last
    checkpoint.

    Example: raylign submit recipes/quickstart.yaml --address http://127.0.0.1:8265
    """
    from ..cluster.errors import InputError
    from ..cluster.rundir import refuse_reserved
    from ..cluster.submission import job_storage
    from ..trainers.recipe import load_recipe

    limits = when(after, priority, max_hours)
    overrides = [*(set_ or []), *limits, *([f"name={name}"] if name else [])]
    config = load_recipe(recipe, overrides)
    refuse_reserved(config.name)
    place = job_storage(storage, address)
    if wheel and not wheel.is_file():
        raise InputError(f"no wheel at {wheel}: build one with `python -m build --wheel`")
    sets = [*(set_ or []), *limits, *_sets_for_the_job(config, recipe, overrides, address)]
    job, new = _send(config.name, recipe, address, place, sets, wheel)
    _print(job, new, address, place, json=json)
    if follow:
        _follow(job, address)


def _sets_for_the_job(config: "RunConfig", recipe: Path, overrides: list[str], address: str) -> list[str]:
    """Overrides that make the recipe mean the same where the job runs."""
    from ..cluster.errors import InputError
    from ..cluster.jobs import is_loopback
    from ..trainers.shipping import as_overrides, outside_paths, paths_as_written

    outside = outside_paths(config, recipe.parent)
    written = paths_as_written(recipe, overrides)
    leaves = [key for key in outside if not Path(written.get(key, "")).is_absolute()]
    if leaves and not is_loopback(address):
        raise InputError(
            f"{recipe}: {leaves[0]} is {written.get(leaves[0])!r}, outside the folder that is sent: "
            "put it beside the recipe, or give an absolute path that the cluster shares"
        )
    here = ["cluster.address=null"] if config.cluster.address else []
    return [*as_overrides(outside), *here]


def _send(
    run: str, recipe: Path, address: str, storage: str, overrides: list[str], wheel: Path | None
) -> "tuple[Job, bool]":
    from ..cluster.jobs import Jobs
    from ..cluster.submission import Submission, entrypoint

    command = entrypoint(recipe.name, run, storage, overrides)
    jobs = Jobs(address)
    job, new = jobs.submit(run, command, working_dir=recipe.resolve().parent, wheels=[wheel] if wheel else [])
    attempts = tuple(a.submission_id for a in jobs.attempts(run))
    Submission(run, jobs.address, job.submission_id, attempts, storage).save()
    return job, new


def _print(job: "Job", new: bool, address: str, storage: str, *, json: bool) -> None:
    if json:
        facts = {"run": job.run, "submission_id": job.submission_id, "attempt": job.attempt, "status": job.status}
        print_json({**facts, "new": new, "address": address, "storage": storage})
        return
    if not new:
        done = "is running there" if not job.final else f"has {job.status} there"
        notes.print(f"{job.run} {done} already; it is not started again", highlight=False)
    notes.print(f"follow it: raylign logs {job.run} -f --storage {storage}", highlight=False)
    answer.print(job.run, highlight=False)


def _follow(job: "Job", address: str) -> None:
    from ..cluster.jobs import Jobs

    ended = Jobs(address).follow(job.submission_id, write)
    notes.print(f"{ended.run}: {ended.status}", highlight=False)
    if ended.status != "succeeded":
        raise typer.Exit(ended.exit_code)
