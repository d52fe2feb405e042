"""Who worked when: a lane a worker, a bar a piece of work, from the spans in a run's events."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .figures import COLORS, GRID, INK, PHASES, add_legend, finish_figure, new_figure

Span = dict[str, Any]
"""`lane`, `what`, `start` and `end` in seconds since the epoch, and perhaps `step` and `stage`."""

Window = tuple[float, float]
_ROLES = ("train", "policy", "critic", "reference", "rollout", "reward")
_FEW_STEPS = 4


def draw_lanes(spans: Sequence[Span], title: str, path: Path, window: Window | None = None) -> None:
    """Draw the spans, or those inside a window, over seconds since the first span of the run."""
    origin = min(s["start"] for s in spans)
    shown = [s for s in spans if window is None or (s["end"] > window[0] and s["start"] < window[1])]
    lanes = lane_order(s["lane"] for s in shown)
    figure, axes = new_figure(9.8, 0.95 + 0.3 * len(lanes))
    bars: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for span in shown:
        bars[span["what"]].append((lanes.index(span["lane"]), span["start"] - origin, span["end"] - origin))
    for what, color in _colors(bars).items():
        rows, starts, ends = zip(*bars[what], strict=True)
        widths = [end - start for start, end in zip(starts, ends, strict=True)]
        _bars(axes, rows, starts, widths, color, what)
    axes.set_yticks(range(len(lanes)), lanes, color=INK)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    left, right = window or (origin, max(s["end"] for s in spans))
    axes.set_xlim(left - origin, max(right - origin, left - origin + 1e-3))
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    add_legend(axes)
    finish_figure(figure, axes, title, "seconds since the first", path)


def middle_steps(spans: Sequence[Span]) -> Window | None:
    """A window of a few steps in the middle of the updates; none where the run is no longer than that."""
    updates = sorted((s for s in spans if s["what"] == "update"), key=lambda s: s["start"])
    if len(updates) <= 2 * _FEW_STEPS:
        return None
    first = len(updates) // 2
    gap = median(b["end"] - a["end"] for a, b in pairwise(updates))
    start = updates[first]["end"] - gap
    return start, start + (_FEW_STEPS + 0.2) * gap


def lane_order(lanes: Any) -> list[str]:
    """Lanes by role in the order of the flow, then by number."""

    def key(lane: str) -> tuple[int, list[tuple[int, str]]]:
        role = lane.partition("-")[0]
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", lane) if p]
        return (_ROLES.index(role) if role in _ROLES else len(_ROLES)), parts

    return sorted(set(lanes), key=key)


def _colors(what: Any) -> dict[str, str]:
    """The phases in their colours and order, then everything else."""
    others = [w for w in what if w not in PHASES]
    known = {phase: color for phase, color in PHASES.items() if phase in what}
    spare = [COLORS[5], "#b59b3a", "#5aa9c7"]
    return known | {w: spare[i % len(spare)] for i, w in enumerate(others)}


def _bars(
    axes: Any, rows: Sequence[int], starts: Sequence[float], widths: Sequence[float], color: str, what: str
) -> None:
    """One collection for all bars of a kind: a run has thousands of spans."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x, row - 0.36), (x + width, row - 0.36), (x + width, row + 0.36), (x, row + 0.36)]
        for row, x, width in zip(rows, starts, widths, strict=True)
    ]
    axes.add_collection(PolyCollection(corners, facecolors=color, edgecolors=color, linewidths=0.4, label=what))
