"""`raylign scale`: another number of rollout workers or scorers while the run goes on."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption

_CALLED = {"rollout": "rollout workers", "reward": "scorers"}


def scale(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    rollout: Annotated[int | None, typer.Option(min=1, help="Rollout workers wanted.")] = None,
    reward: Annotated[int | None, typer.Option(min=1, help="Scorers wanted.")] = None,
    storage: StorageOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until they work; 0 does not wait.")] = 120.0,
    json: JsonOption = False,
) -> None:
    """Change the number of rollout workers or scorers of a running run; its result stays the same.

    Example: raylign scale quickstart --rollout 4
    """
    from ..cluster.rundir import RunDir

    asked = {role: n for role, n in (("rollout", rollout), ("reward", reward)) if n is not None}
    if not asked:
        raise typer.BadParameter("how many are wanted: give --rollout, --reward or both")
    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    _refuse_impossible(directory, asked)
    directory.desire(**asked)
    status = _wait(directory, asked, timeout)
    if timeout and _missing(asked, status):
        _fail(directory, asked, status, timeout)
    facts = {"run": run, "asked": asked, "workers": status.get("workers", {}), "stage": status.get("stage")}
    print_json(facts) if json else answer.print(f"{run}: {_say(facts)}", highlight=False)


def _refuse_impossible(directory: Any, asked: dict[str, int]) -> None:
    """Bounds come from the recipe; a run that has ended, or has no online stage, has no workers to scale."""
    from ..cluster.errors import InputError, RunFailed
    from ..cluster.rundir import FINAL
    from ..trainers.recipe import load_recipe
    from ..trainers.stages import OnlineStage

    if directory.lost():
        raise RunFailed(_lost(directory))
    state = directory.status().get("status")
    if state in FINAL:
        raise InputError(f"run {directory.name!r} has ended ({state}): there is nothing to scale")
    online = [s for s in load_recipe(directory / "recipe.yaml").stages if isinstance(s, OnlineStage)]
    if not online:
        raise InputError(f"run {directory.name!r} has no stage with rollout workers")
    bounds = {
        "rollout": ("rollout.workers", [s.rollout.workers for s in online]),
        "reward": ("scoring.workers", [s.scoring.workers for s in online]),
    }
    for role, wanted in asked.items():
        key, workers = bounds[role]
        low, high = min(w.min for w in workers), max(w.max for w in workers)
        if not low <= wanted <= high:
            raise InputError(f"--{role} {wanted} is outside the recipe's {key}: min {low}, max {high}")


def _missing(asked: dict[str, int], status: dict[str, Any]) -> dict[str, int]:
    """The roles that have another number than is asked for, with that which they have."""
    have = {role: status.get("workers", {}).get(role, 0) for role in asked}
    return {role: n for role, n in have.items() if n != asked[role]}


def _wait(directory: Any, asked: dict[str, int], timeout: float) -> dict[str, Any]:
    from ..cluster.rundir import FINAL

    notes.print(f"waiting for {_named(asked)}", highlight=False)
    deadline = time.monotonic() + timeout
    status = directory.status()
    while status.get("status") not in FINAL and not directory.lost() and time.monotonic() < deadline:
        if not _missing(asked, status):
            break
        time.sleep(0.3)
        status = directory.status()
    return status


def _named(counts: dict[str, int]) -> str:
    return " and ".join(f"{n} {_CALLED[role]}" for role, n in counts.items())


def _lost(directory: Any) -> str:
    return (
        f"run {directory.name!r} is lost, its process is gone: `raylign resume {directory.argument}` goes on from the "
        "last checkpoint"
    )


def _fail(directory: Any, asked: dict[str, int], status: dict[str, Any], timeout: float) -> None:
    """Raise `RunFailed` for a number of workers that has not come about, with what is known of why."""
    from ..cluster.errors import RunFailed
    from ..cluster.rundir import FINAL

    if status.get("status") in FINAL:
        raise RunFailed(f"run {directory.name!r} ended ({status['status']}) before it had {_named(asked)}")
    if directory.lost():
        raise RunFailed(_lost(directory))
    have = _missing(asked, status)
    wanted = " and ".join(str(asked[role]) for role in have)
    raise RunFailed(
        f"run {directory.name!r} has {_named(have)} after {timeout:g} s, {wanted} are asked for (stage "
        f"{status.get('stage')}): the wish stands; `raylign status {directory.argument}` shows how far it is"
    )


def _say(facts: dict[str, Any]) -> str:
    have = {role: facts["workers"].get(role, 0) for role in facts["asked"]}
    if have == facts["asked"]:
        return _named(have)
    return f"{_named(have)} now, {_named(facts['asked'])} asked for (stage {facts['stage']})"
