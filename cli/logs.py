"""`raylign logs`: what a run prints."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import notes, write
from .run import StorageOption

if TYPE_CHECKING:
    from ..cluster.rundir import RunDir
    from ..cluster.submission import Submission

_LOOK_EVERY_SECONDS = 0.3


def logs(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    workers: Annotated[
        bool, typer.Option("--workers", help="Of a submitted run: what every worker printed, too, from its storage.")
    ] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Begin with the last lines only.")] = None,
    storage: StorageOption = None,
) -> None:
    """Print the log of a run. With -f, end when the run does, with its exit code.

    A submitted run is followed through its cluster, again after a broken connection. The log of a run here, and with
    --workers of any whose storage this machine shares, has the lines of all its workers, on whatever node.

    Example: raylign logs quickstart -f
    """
    from ..cluster.rundir import RunDir
    from ..cluster.submission import Submission

    root = (storage or Path("runs")).resolve()
    submission = None if workers else Submission.load(root, run)
    code = _of_job(submission, follow, tail) if submission else _of_file(RunDir.find(root, run), follow, tail)
    if code:
        raise typer.Exit(code)


def _of_job(submission: "Submission", follow: bool, tail: int | None) -> int:
    from ..cluster.jobs import Jobs

    jobs = Jobs(submission.address)
    text = jobs.logs(submission.submission_id)
    write(_last_lines(text, tail))
    if not follow:
        return 0
    job = jobs.follow(submission.submission_id, write, skip=len(text))
    if job.status == "failed" and job.driver_exit_code is None:
        notes.print(job.message, highlight=False)  # it did not come to a log of its own
    notes.print(f"{job.run}: {_ended(submission) or job.status}", highlight=False)
    return job.exit_code


def _ended(submission: "Submission") -> str | None:
    """How the run says it ended, which Ray does not know: to Ray a stopped run's job has failed."""
    from ..cluster.rundir import RunDir

    return RunDir(Path(submission.storage) / submission.run).summary().get("status")


def _of_file(run: "RunDir", follow: bool, tail: int | None) -> int:
    from ..cluster.rundir import FINAL

    path = run / "run.log"
    at = 0
    while True:
        status = run.status().get("status")
        ended = status in FINAL or not run.held()  # asked before the last look at the file, so that nothing is missed
        data = _read_from(path, at)
        text = data.decode(errors="replace")
        write(_last_lines(text, tail) if at == 0 else text)
        at += len(data)
        if not follow:
            return 0
        if ended:
            notes.print(f"{run.name}: {status if status in FINAL else 'lost'}", highlight=False)
            return 0 if status == "succeeded" else 1
        time.sleep(_LOOK_EVERY_SECONDS)


def _read_from(path: Path, at: int) -> bytes:
    """The whole lines of a file after its first `at` bytes."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(at)
        data = file.read()
    return data[: data.rfind(b"\n") + 1]


def _last_lines(text: str, tail: int | None) -> str:
    return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:] if tail else [])
