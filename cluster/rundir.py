"""The run directory: what a run leaves on disk, and how commands and the run speak to each other.

    recipe.yaml     the resolved recipe          events.jsonl   what happened, append-only
    desired.json    what users ask of the run    metrics.jsonl  a line a step
    status.json     what the run last was        summary.json   how it ended
    prepared/ samples/ checkpoints/ models/ adapters/<digest>/ plots/ report.html

`raylign scale` and `stop` write `desired.json`; the run follows it and says in `status.json` where it is. So the same
commands reach a run in this shell, in a Ray job, and on any machine that shares the storage.
"""

import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, NotFound

FINAL = ("succeeded", "failed", "stopped")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; a torn last line (the writer was killed) is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def running_already(name: str) -> InputError:
    """What to raise where another process works on a run."""
    return InputError(f"run {name!r} is running already: `raylign status {name}`")


class RunDir:
    """One run's directory; methods may be called from any thread of the process that owns the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._lock = threading.Lock()

    @classmethod
    def find(cls, storage: Path, name: str) -> "RunDir":
        """The directory of an existing run. Raises `NotFound` with the names there are."""
        run = cls(storage / name)
        if not (run.path / "recipe.yaml").exists():
            known = sorted(p.parent.name for p in storage.glob("*/recipe.yaml"))
            raise NotFound(f"no run {name!r} in {storage}: there {'are ' + ', '.join(known) if known else 'is none'}")
        return run

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the only process that works on the run. Raises `InputError` when another does."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise running_already(self.name) from None
            yield

    def held(self) -> bool:
        """Whether a process on this machine works on the run now."""
        if not (self.path / ".lock").exists():
            return False
        with (self.path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def __truediv__(self, part: str) -> Path:
        return self.path / part

    def _append(self, file: str, record: dict[str, Any]) -> None:
        with self._lock, (self.path / file).open("a") as out:
            out.write(json.dumps(record) + "\n")

    def event(self, kind: str, **fields: Any) -> None:
        """Note that something happened."""
        self._append("events.jsonl", {"time": time.time(), "kind": kind, **fields})

    def span(self, lane: str, what: str, start: float, end: float, **fields: Any) -> None:
        """Note what a worker (`lane`) did from `start` to `end` (seconds since the epoch)."""
        self.event("span", lane=lane, what=what, start=start, end=end, **fields)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events so far, of one kind or all."""
        return [e for e in read_lines(self.path / "events.jsonl") if kind in (None, e["kind"])]

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one step's metrics."""
        self._append("metrics.jsonl", {"time": time.time(), "stage": stage, "step": step, **values})

    def all_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics, in order; of a step that ran twice (after a resume) the later one."""
        latest = {(m["stage"], m["step"]): m for m in read_lines(self.path / "metrics.jsonl")}
        return list(latest.values())

    def _read(self, file: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / file).read_text())
        except FileNotFoundError:  # not written yet, or the run was refused and its directory is gone
            return {}

    def _merge(self, file: str, fields: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            merged = self._read(file) | fields
            write_atomically(self.path / file, json.dumps(merged, indent=1))
        return merged

    def desire(self, **fields: Any) -> dict[str, Any]:
        """Ask something of the run: `rollout=4`, `stop=True`."""
        return self._merge("desired.json", fields)

    def desired(self) -> dict[str, Any]:
        """What has been asked of the run."""
        return self._read("desired.json")

    def update_status(self, **fields: Any) -> None:
        """Say where the run is: `status, stage, step, steps, workers, metrics, …`."""
        self._merge("status.json", fields | {"updated": time.time()})

    def status(self) -> dict[str, Any]:
        """Where the run was when it last said so; empty before it began."""
        return self._read("status.json")

    def summary(self) -> dict[str, Any]:
        """How the run ended; empty while it goes on."""
        return self._read("summary.json")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended, atomically."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1))
