"""What a run is doing now, from its directory alone: for a view that is drawn again and again."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError
from ...cluster.rundir import AT_WORK, RunDir

_CURVES = ("reward/mean", "held_out/accuracy", "accuracy", "kl", "loss", "eval_loss", "tokens_per_second")
"""What is drawn of a stage, those that it has."""
_POINTS = 60
_BARS = "▁▂▃▄▅▆▇█"


def overview(storage: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The runs of a storage, those at work first, or the one of a name; a damaged one says so and hides no other.

    `curves` are the last values of the present stage's metrics, `seconds` by phase those of its last step. Raises
    `NotFound` for a name that is not there.
    """
    if name is not None:
        return [look(RunDir.find(storage, name))]
    found = [_look_or_damage(RunDir(path.parent)) for path in sorted(storage.glob("*/recipe.yaml"))]
    return sorted(found, key=lambda facts: facts["status"] not in AT_WORK)


def look(run: RunDir) -> dict[str, Any]:
    """The facts of one run. Raises `InputError` where its files are damaged."""
    state = run.status()
    lines = [m for m in run.all_metrics() if m["stage"] == state.get("stage")]
    keys = ("stage", "step", "steps", "reason", "since")
    return {
        "run": run.name,
        "status": "lost" if run.lost() else state.get("status") or "not begun",
        **{key: state.get(key) for key in keys},
        **{key: state.get(key) or {} for key in ("workers", "wanted", "groups")},
        "waiting": state.get("waiting") or [],
        "alarms": [alarm["name"] for alarm in state.get("alarms") or []],
        "curves": {key: values for key in _CURVES if (values := _values(lines, key))},
        "seconds": {k.removeprefix("seconds/"): v for k, v in (lines[-1] if lines else {}).items() if "seconds/" in k},
    }


def _look_or_damage(run: RunDir) -> dict[str, Any]:
    try:
        return look(run)
    except InputError as error:
        nothing = dict.fromkeys(("stage", "step", "steps", "since"))
        empty = {key: {} for key in ("workers", "wanted", "groups", "curves", "seconds")}
        said = {"run": run.name, "status": "damaged", "reason": str(error), "waiting": [], "alarms": []}
        return said | nothing | empty


def _values(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)][-_POINTS:]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their least and their most; what is no number is a space."""
    shown = list(values)[-width:] if width > 0 else []
    finite = [v for v in shown if math.isfinite(v)]
    if not finite:
        return " " * len(shown)
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] if math.isfinite(v) else " " for v in shown)
