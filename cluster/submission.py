"""The note a submitted run leaves beside its files, so that other commands find its job again."""

import json
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

    def save(self, storage: Path) -> None:
        """Write `<storage>/<run>/submission.json`."""
        write_atomically(storage / self.run / "submission.json", json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, storage: Path, run: str) -> "Submission | None":
        """The note of a run, or none if it was not submitted from here."""
        path = storage / run / "submission.json"
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            return cls(**data | {"attempts": tuple(data["attempts"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it and submit the run again") from None


def job_storage(storage: str | None, address: str) -> str:
    """The storage as the job sees it: absolute, or a URL.

    On this machine it is `runs` of the working directory by default; elsewhere it must be given, since the cluster has
    to share it. Raises `InputError`.
    """
    if storage and "://" in storage:
        return storage
    if is_loopback(address):
        return str(Path(storage or "runs").resolve())
    if not storage or not Path(storage).is_absolute():
        raise InputError(
            f"{address} is another machine: give --storage an absolute path or a URL that all its nodes share"
            + (f", not {storage!r}" if storage else "")
        )
    return storage


def note_storage(storage: str) -> Path:
    """Where the note of a submission goes: the storage itself if it is a path of this machine, else `runs`."""
    return Path("runs") if "://" in storage else Path(storage)
