"""`raylign status`: where runs are."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json, print_table
from .run import JsonOption, StorageOption


def status(
    run: Annotated[str | None, typer.Argument(help="A run's name; all runs without it.")] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show where a run is: stage, step, workers of each role, last metrics; or one line for every run.

    Example: raylign status quickstart --json
    """
    from ..cluster.rundir import RunDir

    root = (storage or Path("runs")).resolve()
    if run is None:
        found = [_facts_or_damage(RunDir(p.parent)) for p in sorted(root.glob("*/recipe.yaml"))]
        print_json(found) if json else _print_all(found)
        return
    facts = _job(root, run) or _facts(RunDir.find(root, run))
    print_json(facts) if json else _print_one(facts)


_NOWHERE = {
    "stage": None,
    "step": None,
    "steps": None,
    "workers": {},
    "wanted": {},
    "groups": {},
    "metrics": {},
    "alarms": [],
    "attempts": [],
    "waiting": [],
}


def _facts(directory: Any) -> dict[str, Any]:
    from ..cluster.rundir import AT_WORK

    state = directory.status()
    facts = {key: state.get(key) for key in ("status", "reason", "stage", "step", "steps")}
    facts |= {key: state.get(key, {}) for key in ("workers", "wanted", "groups", "metrics")}
    facts["alarms"] = state.get("alarms", [])
    facts |= {key: state.get(key) for key in ("since", "address", "dashboard")}
    facts["attempts"] = directory.attempts()
    facts["waiting"] = state.get("waiting", []) if state.get("status") in AT_WORK else []
    if directory.lost():
        facts["status"] = "lost"
        facts["reason"] = f"its process is gone: `raylign resume {directory.argument}` goes on from the last checkpoint"
    return {"run": directory.name, **facts}


def _facts_or_damage(directory: Any) -> dict[str, Any]:
    """The facts of one of many runs: one that cannot be read must not hide the others."""
    from ..cluster.errors import InputError

    try:
        return _facts(directory)
    except InputError as error:
        nothing = {"since": None, "address": None, "dashboard": None}
        return {"run": directory.name, "status": "damaged", "reason": str(error), **_NOWHERE, **nothing}


def _job(root: Path, run: str) -> dict[str, Any] | None:
    """A submitted run that has no directory yet (it is pending, or could not begin): what its cluster says."""
    from ..cluster.submission import Submission

    submission = Submission.load(root, run)
    if submission is None or (root / run / "recipe.yaml").exists():
        return None
    from ..cluster.jobs import Jobs

    job = Jobs(submission.address).status(submission.submission_id)
    return {
        "run": run,
        "status": job.status,
        "reason": (job.message.strip().splitlines() or [""])[-1],
        **_NOWHERE,
        "since": None,
        "address": submission.address,
        "dashboard": submission.address,
    }


def _print_all(found: list[dict[str, Any]]) -> None:
    rows = [[f["run"], f["status"], _place(f), _workers(f["workers"]), f["reason"] or ""] for f in found]
    print_table("runs", ["run", "status", "at", "workers", "reason"], rows)


def _print_one(facts: dict[str, Any]) -> None:
    from ..cluster.rundir import FINAL

    rows = [["status", facts["status"]], ["at", _place(facts)], ["workers", _workers(facts["workers"])]]
    other = {role: n for role, n in facts["wanted"].items() if n != facts["workers"].get(role)}
    if other and facts["workers"]:
        rows.append(["asked for", _workers(other)])
    if facts["dashboard"] and facts["status"] not in (*FINAL, "lost"):
        rows.append(["dashboard", facts["dashboard"]])
    rows += [["reason", facts["reason"]]] if facts["reason"] else []
    oldest = sorted(facts["waiting"], key=lambda wait: wait["since"])[:3]
    rows += [["waits for", f"{w['what']} {w['actor']}, {time.time() - w['since']:.0f} s"] for w in oldest]
    if len(facts["attempts"]) > 1:
        rows.append(["attempts", ", ".join(a["status"] or "not ended" for a in facts["attempts"])])
    rows += [[name, f"{value:.4g}"] for name, value in facts["metrics"].items()]
    rows += [[f"alarm {alarm['name']}", f"{alarm['saw']}. Try: {alarm['attempt']}"] for alarm in facts["alarms"]]
    print_table(facts["run"], ["", ""], rows)


def _place(facts: dict[str, Any]) -> str:
    return f"{facts['stage']} {facts['step']}/{facts['steps']}" if facts["stage"] else ""


def _workers(workers: dict[str, int]) -> str:
    return ", ".join(f"{role} {count}" for role, count in workers.items() if count)
