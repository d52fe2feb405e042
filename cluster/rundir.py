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
import shlex
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import wishes
from .auth import token_file
from .errors import ClusterUnreachable, InputError, NotFound

FINAL = ("succeeded", "failed", "stopped")

AT_WORK = ("preparing", "queued", "starting", "running")
"""What a run says of itself while a process works on it."""

RESERVED = ("registry",)
"""Folders of a storage that are no run's."""

_HOLD_SECONDS = 0.5
"""How long `hold` tries: who asks whether a run is held has its lock for an instant."""


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
    """The records of a JSONL file; torn lines (their writer was killed) are left out."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            if line.endswith("\n") and (record := _record(line)) is not None:
                yield record


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_json(path: Path) -> Any:
    """What a JSON file of a run says. Raises `FileNotFoundError`, and `InputError` where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}): put a copy back, or remove it and resume the run, which writes it again"
        ) from None


def refuse_reserved(name: str) -> None:
    """Raise `InputError` for a run's name that the storage needs for itself."""
    if name in RESERVED:
        raise InputError(
            f"a run cannot be called {name!r}, which is the folder of the published models: --name another"
        )


def running_already(run: "RunDir") -> InputError:
    """What to raise where another process works on a run."""
    return InputError(f"run {run.name!r} is running already: `raylign status {run.argument}`")


class RunDir:
    """One run's directory; methods may be called from any thread of the process that owns the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.created = False
        """Whether this process made the directory, and so may take it away again."""
        self._lock = threading.Lock()
        self._holds = False
        self._refused: dict[str, Any] = {}

    @classmethod
    def find(cls, storage: Path, name: str) -> "RunDir":
        """The directory of an existing run. Raises `NotFound` with the names there are."""
        run = cls(storage / name)
        if not (run.path / "recipe.yaml").exists():
            known = sorted(p.parent.name for p in storage.glob("*/recipe.yaml"))
            raise NotFound(f"no run {name!r} in {storage}: there {'are ' + ', '.join(known) if known else 'is none'}")
        return run

    @property
    def argument(self) -> str:
        """The run as a command line names it: `NAME`, with its --storage where that is not ./runs."""
        storage = self.path.parent.resolve()
        return self.name if storage == Path("runs").resolve() else f"{self.name} --storage {shlex.quote(str(storage))}"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the only process that works on the run, with those that it forks; again inside, it changes nothing.

        Raises `InputError` when another works on it.
        """
        if self._holds:
            yield
            return
        give_up = time.monotonic() + _HOLD_SECONDS
        with (self.path / ".lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        raise running_already(self) from None
                time.sleep(0.02)
            self._holds = True
            try:
                yield
            finally:
                self._holds = False

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

    def lost(self) -> bool:
        """Whether the run says that it is at work and its process is gone; of other machines' processes, never."""
        state = self.status()
        here = state.get("host") == socket.gethostname()  # a lock tells nothing of another machine's processes
        return state.get("status") in AT_WORK and here and not self.held()

    def discard(self) -> bool:
        """Remove a directory that this process made and no training has used; whether it did."""
        if not self.created or (self.path / "progress.json").exists() or (self.path / "checkpoints").exists():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def __truediv__(self, part: str) -> Path:
        return self.path / part

    def _append(self, file: str, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with self._lock, (self.path / file).open("ab+") as out:
            if out.seek(0, os.SEEK_END):
                out.seek(-1, os.SEEK_END)
                line = line if out.read(1) == b"\n" else b"\n" + line  # a writer was killed within its last line
            out.write(line)

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
            return read_json(self.path / file)
        except FileNotFoundError:  # not written yet, or the run was refused and its directory is gone
            return {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one, of all threads and processes of this machine, that rewrites a file of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock, (self.path / ".writing").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def desire(self, **fields: Any) -> dict[str, Any]:
        """Ask something of the run: `rollout=4`, `stop=True`; signed (see `wishes`).

        Raises `ClusterUnreachable` where the run's cluster has another token than this user.
        """
        if (asked := self.status().get("control")) and asked != wishes.proof(self.name):
            raise ClusterUnreachable(
                f"run {self.name!r} listens to those with its cluster's token: put that into {token_file()}, or set "
                "RAY_AUTH_TOKEN_PATH to a file that holds it"
            )
        with self._alone():
            before = self._read("desired.json")
            merged = (wishes.without_signature(before) if wishes.valid(self.name, before) else {}) | fields
            write_atomically(self.path / "desired.json", json.dumps(wishes.signed(self.name, merged), indent=1))
        return merged

    def desired(self) -> dict[str, Any]:
        """What has been asked of the run by those who may; other wishes are noted (event `wish_refused`) and empty."""
        written = self._read("desired.json")
        if wishes.valid(self.name, written) or not written:
            return wishes.without_signature(written)
        if written != self._refused:
            self._refused = written
            self.event("wish_refused", reason="it is not signed with the cluster's token")
        return {}

    def listen(self) -> None:
        """Begin to take wishes, from those who have the token that this process has, and forget earlier ones."""
        self.update_status(control=wishes.proof(self.name))
        self.desire(stop=False, why="", rollout=None, reward=None)

    def update_status(self, **fields: Any) -> None:
        """Say where the run is: `status, stage, step, steps, workers, metrics, …`.

        `updated` is the time of it, `since` when the run came into its present `status` (seconds since the epoch).
        """
        now = time.time()
        with self._alone():
            before = self._read("status.json")
            merged = before | fields | {"updated": now}
            if merged.get("status") != before.get("status"):
                merged["since"] = now
            write_atomically(self.path / "status.json", json.dumps(merged, indent=1))

    def restore_status(self, status: dict[str, Any]) -> None:
        """Put back a status that `status` gave earlier."""
        with self._alone():
            if status:
                write_atomically(self.path / "status.json", json.dumps(status, indent=1))
            else:
                (self.path / "status.json").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """Where the run was when it last said so; empty before it began."""
        return self._read("status.json")

    def summary(self) -> dict[str, Any]:
        """How the run ended; empty while it goes on."""
        return self._read("summary.json")

    def attempts(self) -> list[dict[str, Any]]:
        """Every start of the run, oldest first: `began`, `ended`, `status`, `reason`, and its controller's `restarts`.

        Times are seconds since the epoch; there is no end while it goes on, and where its process was lost.
        """
        found: list[dict[str, Any]] = []
        for event in self.events():
            if event["kind"] == "run_began" and not event.get("again"):
                found.append({"began": event["time"], "ended": None, "status": None, "reason": "", "restarts": 0})
            elif event["kind"] == "controller_lost" and found:
                found[-1]["restarts"] += 1
            elif event["kind"] == "run_ended" and found:
                found[-1] |= {"ended": event["time"], "status": event["status"], "reason": event["reason"]}
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended, atomically."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1))
