"""When a run may begin: after other runs, and in a queue for what a cluster has free.

The queue is a folder of the storage, `.queue/`, with a ticket for each run that waits in it or has just left it.
Whoever waits looks at it every second; so it needs no server, and works wherever runs share a storage. A ticket that is
not renewed is that of a run whose process is gone, and counts for nothing.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..cluster.calls import Wait
from ..cluster.errors import DoesNotFit, InputError, RunFailed
from ..cluster.rundir import FINAL, RunDir, write_atomically
from ..cluster.submission import Submission

_LOOK_SECONDS = 1.0
_RENEWED_SECONDS = 30.0
"""A ticket that is older belongs to nobody."""

Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A run's place in the queue of a cluster: the higher `priority` first, then who came first (`since`)."""

    run: str
    cluster: str
    priority: int
    since: float
    leaves: float = 0.0
    """Until when a run that has left the queue may be taking its places; 0 while it waits."""

    def before(self, other: "Ticket") -> bool:
        """Whether it comes before another that waits; who is taking places comes before all."""
        mine, theirs = (-self.priority, self.since, self.run), (-other.priority, other.since, other.run)
        return bool(self.leaves) or mine < theirs


def wait_for_runs(run: RunDir, names: Sequence[str], check: Check) -> None:
    """Wait until the runs of these names, in the same storage, have succeeded.

    `check` is called between looks, and may raise to end the wait. Raises `NotFound` for the name of no run,
    `InputError` for the run's own, and `RunFailed` where one of them has ended otherwise.
    """
    others = [_known(run.path.parent, name) for name in names]
    if run.name in names:
        raise InputError(f"run {run.name!r} cannot begin after itself: take another --after")
    with _queued(run) as say:
        while missing := [other for other in others if not _succeeded(other, run)]:
            lost = f", which is lost: `raylign resume {missing[0].argument}`" if missing[0].lost() else ""
            say(f"run {missing[0].name} to succeed{lost}")
            _pause(check)


def _known(storage: Path, name: str) -> RunDir:
    """A run that is there, or was submitted and waits for its cluster. Raises `NotFound`."""
    return RunDir(storage / name) if Submission.load(storage, name) else RunDir.find(storage, name)


def _succeeded(other: RunDir, run: RunDir) -> bool:
    status = other.status().get("status")
    if status in FINAL and status != "succeeded":
        raise RunFailed(
            f"run {other.name!r} {'has failed' if status == 'failed' else 'was stopped'}, and {run.name!r} comes after "
            f"it: mend and resume {other.name!r}, then `raylign resume {run.argument}`"
        )
    return status == "succeeded"


def wait_for_turn(run: RunDir, cluster: str, priority: int, seconds: float, fits: Check, check: Check) -> None:
    """Wait until no run comes before this one in the queue of `cluster`, and what it asks for is free.

    `fits` raises `DoesNotFit` while it is not; `seconds` is how long a run that has its turn may take its places,
    before the next one looks for its own. `check` is as in `wait_for_runs`.
    """
    queue = run.path.parent / ".queue"
    ticket = Ticket(run.name, cluster, priority, time.time())
    path = queue / f"{run.name}.json"
    try:
        with _queued(run) as say:
            _write(path, ticket)
            while why := _ahead(queue, ticket) or _not_free(fits):
                say(why)
                _pause(check)
                _write(path, ticket)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    _write(path, replace(ticket, leaves=time.time() + seconds))


def _ahead(queue: Path, ticket: Ticket) -> str:
    """Who of the same cluster's queue comes first, in words; empty if nobody does."""
    others = [t for t in _tickets(queue) if t.run != ticket.run and t.cluster == ticket.cluster]
    first = sorted((t for t in others if t.before(ticket)), key=lambda t: (not t.leaves, -t.priority, t.since))
    if not first:
        return ""
    return f"its turn: {len(first)} in the queue before it, {first[0].run} next"


def _not_free(fits: Check) -> str:
    try:
        fits()
    except DoesNotFit as error:
        return f"room: {error}"
    return ""


def _tickets(queue: Path) -> Iterator[Ticket]:
    for path in queue.glob("*.json"):
        try:
            age = time.time() - path.stat().st_mtime
            ticket = Ticket(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # it was taken away, or is nobody's
            continue
        if _counts(ticket, age, RunDir(queue.parent / ticket.run)):
            yield ticket


def _counts(ticket: Ticket, age: float, run: RunDir) -> bool:
    """Whether a run waits, or has left the queue and is not seen to have its places yet."""
    if not ticket.leaves:
        return age < _RENEWED_SECONDS
    state = run.status()
    placed = any((state.get("workers") or {}).values())
    return time.time() < ticket.leaves and state.get("status") not in FINAL and not placed


def _write(path: Path, ticket: Ticket) -> None:
    write_atomically(path, json.dumps(asdict(ticket)))


@contextmanager
def _queued(run: RunDir) -> Iterator[Callable[[str], None]]:
    """Gives what says that the run is queued, and what for; afterwards it is again what it was."""
    before, since = run.status().get("status"), time.time()

    def say(why: str) -> None:
        wait = Wait(what=why, actor="", node="", since=since)
        run.update_status(status="queued", reason=f"waits for {why}", waiting=[asdict(wait)])

    try:
        yield say
    finally:
        run.update_status(status=before, reason="", waiting=[])


def _pause(check: Check) -> None:
    until = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < until:
        check()
        time.sleep(0.05)
