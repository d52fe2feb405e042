"""The plots of a sweep: the metric of every trial by step, and its best value by each key that was tried."""

from collections.abc import Sequence
from pathlib import Path

from ..report.figures import COLORS, MUTED, finish_figure, new_figure
from .search import Goal, Outcome
from .space import Param


def draw(outcomes: Sequence[Outcome], params: Sequence[Param], goal: Goal, folder: Path) -> list[Path]:
    """Write `curves.png` and `<key>.png` of every key, the best trial in colour; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [o for o in outcomes if o.best is not None]
    if not shown:
        return []
    return [_curves(shown, goal, folder / "curves.png"), *(_by_key(shown, p, goal, folder) for p in params)]


def _curves(shown: Sequence[Outcome], goal: Goal, path: Path) -> Path:
    figure, axes = new_figure(7.0, 3.2)
    for outcome in reversed(shown):
        best = outcome is shown[0]
        steps, values = zip(*outcome.curve, strict=True)
        axes.plot(steps, values, color=COLORS[0] if best else MUTED, alpha=1.0 if best else 0.45, linewidth=1.4)
    finish_figure(figure, axes, f"{goal.metric} of every trial; in colour {shown[0].run}", "", path)
    return path


def _by_key(shown: Sequence[Outcome], param: Param, goal: Goal, folder: Path) -> Path:
    figure, axes = new_figure(7.0, 3.2)
    points = [(o.values[param.key], o.best or 0.0) for o in shown if param.key in o.values]
    numbers = all(isinstance(value, int | float) for value, _ in points)
    axes.scatter([v if numbers else str(v) for v, _ in points], [b for _, b in points], color=COLORS[0], s=18)
    if param.kind == "loguniform":
        axes.set_xscale("log")
    path = folder / f"{param.key}.png"
    finish_figure(figure, axes, f"best {goal.metric} by {param.key}", "", path)
    return path
