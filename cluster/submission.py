"""The note of a submitted run, so that other commands find its job again.

It lies beside the run directories and not in one: a run that cannot begin leaves no directory, but its job has a log.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import InputError
from .jobs import is_loopback
from .rundir import write_atomically


@dataclass(frozen=True, slots=True)
class Submission:
    """Where a run's job is: the jobs URL, the newest attempt, all attempts, and the storage the run writes to."""

    run: str
    address: str
    submission_id: str
    attempts: tuple[str, ...]
    storage: str

    def save(self) -> None:
        """Write `<storage>/.submitted/<run>.json`."""
        write_atomically(_note(Path(self.storage), self.run), json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, storage: Path, run: str) -> "Submission | None":
        """The note of a run, or none if it was not submitted from here."""
        path = _note(storage, run)
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            return cls(**data | {"attempts": tuple(data["attempts"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it and submit the run again") from None


def job_storage(storage: str | None, address: str) -> str:
    """The storage as the job sees it: an absolute path.

    On this machine it is `runs` of the working directory by default; elsewhere it must be given, since the cluster has
    to share it. Raises `InputError`.
    """
    if storage and "://" in storage:
        raise InputError(
            f"--storage {storage}: a run writes to a path; mount the bucket on every node and give its path"
        )
    if is_loopback(address):
        return str(Path(storage or "runs").resolve())
    if not storage or not Path(storage).is_absolute():
        raise InputError(
            f"{address} is another machine: give --storage an absolute path that it and this machine share"
            + (f", not {storage!r}" if storage else "")
        )
    return storage


def _note(storage: Path, run: str) -> Path:
    return storage / ".submitted" / f"{run}.json"


def entrypoint(recipe: str, run: str, storage: str, overrides: Sequence[str]) -> str:
    """The job's command: `raylign run` on a copy of the folder that was sent, going on with what was left earlier."""
    flags = ["--name", run, "--storage", storage, "--resume", "--keep-source"]
    sets = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", "-m", "raylign.cli", "run", recipe, *flags, *sets])


def resume_entrypoint(run: str, storage: str, max_hours: float | None) -> str:
    """The command of a job that goes on with a run which is in its storage, on the job's own cluster."""
    flags = ["--storage", storage, *(["--max-hours", str(max_hours)] if max_hours else [])]
    return f'{shlex.join(["python", "-m", "raylign.cli", "resume", run, *flags])} --address "$RAY_ADDRESS"'
