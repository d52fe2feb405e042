"""`raylign why`: what a run waits for."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answer, print_json, print_table
from .run import JsonOption, StorageOption

_QUIET_SECONDS = 5.0
"""A run writes its status twice a second; one that has not for longer is itself what holds things up."""


def why(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a run is waiting for, the longest first: what, on which actor and node, for how many seconds.

    Example: raylign why quickstart
    """
    from ..cluster.rundir import RunDir

    facts = _facts(RunDir.find((storage or Path("runs")).resolve(), run), time.time())
    print_json(facts) if json else _print(facts)


def _facts(directory: Any, now: float) -> dict[str, Any]:
    """What the run directory says; so an answer comes while the run's own process is blocked."""
    from ..cluster.rundir import AT_WORK

    state = directory.status()
    lost = directory.lost()
    running = state.get("status") in AT_WORK and not lost
    return {
        "run": directory.name,
        "running": running,
        "status": "lost" if lost else state.get("status"),
        **{key: state.get(key) for key in ("stage", "step", "steps")},
        "waiting": _waiting(state, now) if running else [],
    }


def _waiting(state: dict[str, Any], now: float) -> list[dict[str, Any]]:
    """What the run said it waits for. One that tells nothing of it is in a step of a stage without a controller, or
    between two stages; one that fell silent is itself what holds things up."""
    waits, updated = list(state.get("waiting", [])), state.get("updated", now)
    here = {"node": state.get("host", ""), "since": updated}
    if not waits:
        at = f"step {state['step']} of {state['stage']}" if state.get("stage") else state["status"]
        waits = [{"what": f"the end of {at}", "actor": "", **here}]
    elif now - updated > _QUIET_SECONDS:
        waits.append({"what": "a report of the run", "actor": "controller", **here})
    timed = [wait | {"seconds": round(max(0.0, now - wait["since"]), 1)} for wait in waits]
    return sorted(timed, key=lambda wait: wait["since"])


def _print(facts: dict[str, Any]) -> None:
    if not facts["running"]:
        answer.print(f"{facts['run']} is not running: {facts['status'] or 'it has not begun'}", highlight=False)
        return
    place = f"{facts['stage']} {facts['step']}/{facts['steps']}" if facts["stage"] else facts["status"]
    rows = [[w["what"], w["actor"], w["node"], f"{w['seconds']:.1f}"] for w in facts["waiting"]]
    print_table(f"{facts['run']} ({place}) waits for", ["what", "actor", "node", "seconds"], rows)
