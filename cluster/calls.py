"""Waiting for actors: every wait has a time-out and an error that names the actor and what it was doing."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .errors import RaylignError, RunFailed, WorkerFailed, WorkerLost

TICK_SECONDS = 0.4
"""How long a wait that has something to look after goes without doing so."""

DEATH_SECONDS = 2.0
"""How long the death of an actor may take to become known once its peers have failed of it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Something that is waited for, as `raylign why` tells it: on which actor and node, since when."""

    what: str
    actor: str
    node: str
    since: float
    """Seconds since the epoch."""


def epoch(moment: float) -> float:
    """A moment of the monotonic clock as seconds since the epoch."""
    return time.time() - (time.monotonic() - moment)


def get(refs: Any, *, actor: str, what: str, timeout: float, tick: Callable[[], None] | None = None) -> Any:
    """`ray.get` with an owner. Raises the actor's own `RaylignError`; `WorkerLost` when it died or took too long.

    `tick` is called at least twice a second meanwhile; what it raises ends the wait, and the call goes on unheard.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    give_up = time.monotonic() + timeout
    while True:
        left = max(0.0, give_up - time.monotonic())
        try:
            return ray.get(refs, timeout=min(left, TICK_SECONDS) if tick else left)
        except RayTaskError as error:
            raise _explained(error, actor, what) from error
        except GetTimeoutError:
            if time.monotonic() >= give_up:
                raise WorkerLost(f"{actor} did not finish {what} within {timeout:.0f} s") from None
        except RayError as error:
            raise _explained(error, actor, what) from None
        if tick:
            tick()


def death(refs: Mapping[str, Any], what: str) -> WorkerLost | None:
    """How one of the actors of these calls died, if any did, where one of them failed and the others may be why."""
    import ray

    ended, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=DEATH_SECONDS)
    for name, ref in refs.items():
        if ref in ended:
            try:
                get(ref, actor=name, what=what, timeout=0)
            except WorkerLost as lost:
                return lost
            except RaylignError:
                continue
    return None


def outcome(future: "Future[Any]", *, actor: str, what: str) -> Any:
    """The result of a call that has ended. Raises as `get` does."""
    from ray.exceptions import RayError

    try:
        return future.result(timeout=0)
    except RayError as error:
        raise _explained(error, actor, what) from error


def _explained(error: Any, actor: str, what: str) -> RaylignError:
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayActorError) and error.actor_init_failed:
        return RunFailed(f"{actor} failed in {what}: {str(error).strip().splitlines()[-1]}")  # it would fail again
    if not isinstance(error, RayTaskError):
        return WorkerLost(f"{actor} was lost during {what}: {_first_line(error)}")
    cause = getattr(error, "cause", None)
    if isinstance(cause, RaylignError):
        return cause
    return WorkerFailed(f"{actor} failed in {what}: {type(cause).__name__}: {_first_line(cause or error)}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def wait_until_gone(name: str, *, timeout: float, tick: Callable[[], None] | None = None) -> None:
    """Wait until no actor has this name, or one that begins with `name/`.

    Ray keeps the name of a killed actor for a moment, and those of a driver that died until it has noticed. Raises
    `WorkerLost` when they stay.
    """
    from ray.util import list_named_actors

    give_up = time.monotonic() + timeout
    while left := [n for n in list_named_actors() if n == name or n.startswith(f"{name}/")]:
        if time.monotonic() > give_up:
            raise WorkerLost(f"{left[0]} has been ended and is still there after {timeout:.0f} s")
        if tick:
            tick()
        time.sleep(0.05)


def end(actors: Sequence[Any]) -> None:
    """Kill actors that have nothing left to lose; the dead are no error."""
    import ray

    for actor in actors:
        ray.kill(actor, no_restart=True)
