"""`raylign scale`: another number of rollout workers while the run goes on."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption


def scale(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    rollout: Annotated[int, typer.Option(min=1, help="Rollout workers wanted.")],
    storage: StorageOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until they work; 0 does not wait.")] = 120.0,
    json: JsonOption = False,
) -> None:
    """Change the number of rollout workers of a running run; its result stays the same.

    Example: raylign scale quickstart --rollout 4
    """
    from ..cluster.rundir import RunDir

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    _refuse_impossible(directory, rollout)
    directory.desire(rollout=rollout)
    status = _wait(directory, rollout, timeout)
    if timeout and status.get("workers", {}).get("rollout") != rollout:
        _fail(directory, rollout, status, timeout)
    facts = {"run": run, "asked": rollout, "workers": status.get("workers", {}), "stage": status.get("stage")}
    print_json(facts) if json else answer.print(f"{run}: {_say(facts)}", highlight=False)


def _refuse_impossible(directory: Any, rollout: int) -> None:
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
    low, high = min(s.rollout.workers.min for s in online), max(s.rollout.workers.max for s in online)
    if not low <= rollout <= high:
        raise InputError(f"--rollout {rollout} is outside the recipe's rollout.workers: min {low}, max {high}")


def _wait(directory: Any, rollout: int, timeout: float) -> dict[str, Any]:
    from ..cluster.rundir import FINAL

    notes.print(f"waiting for {rollout} rollout workers", highlight=False)
    deadline = time.monotonic() + timeout
    status = directory.status()
    while status.get("status") not in FINAL and not directory.lost() and time.monotonic() < deadline:
        if status.get("workers", {}).get("rollout") == rollout:
            break
        time.sleep(0.3)
        status = directory.status()
    return status


def _lost(directory: Any) -> str:
    return (
        f"run {directory.name!r} is lost, its process is gone: `raylign resume {directory.argument}` goes on from the "
        "last checkpoint"
    )


def _fail(directory: Any, rollout: int, status: dict[str, Any], timeout: float) -> None:
    """Raise `RunFailed` for a number of workers that has not come about, with what is known of why."""
    from ..cluster.errors import RunFailed
    from ..cluster.rundir import FINAL

    if status.get("status") in FINAL:
        raise RunFailed(f"run {directory.name!r} ended ({status['status']}) before it had {rollout} rollout workers")
    if directory.lost():
        raise RunFailed(_lost(directory))
    have, stage = status.get("workers", {}).get("rollout", 0), status.get("stage")
    raise RunFailed(
        f"run {directory.name!r} has {have} rollout workers after {timeout:g} s, {rollout} are asked for (stage "
        f"{stage}): the wish stands; `raylign status {directory.argument}` shows how far it is"
    )


def _say(facts: dict[str, Any]) -> str:
    have = facts["workers"].get("rollout", 0)
    if have == facts["asked"]:
        return f"{have} rollout workers"
    return f"{have} rollout workers now, {facts['asked']} asked for (stage {facts['stage']})"
