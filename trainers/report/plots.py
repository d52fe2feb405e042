"""The plots of a run, drawn from its metrics and spans; PNG files, no display needed.

Each plot is one question (did the reward rise, where did the time go); one without data is not drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import COLORS, MUTED, PHASES, add_legend, finish_figure, new_figure
from .lanes import Span, draw_lanes, middle_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]

_SMOOTH_FROM = 30
"""From so many steps on, a running mean is drawn over the raw curve."""


@dataclass(frozen=True)
class Panel:
    """One curve plot of a stage: which metrics, under which title."""

    slug: str
    title: str
    keys: tuple[str, ...]
    unit: str = ""
    log: bool = False
    zero: bool = False
    """Whether the axis begins at 0."""


PANELS = (
    Panel("accuracy", "Accuracy of the batch", ("accuracy",), zero=True),
    Panel("loss", "Loss", ("loss", "eval_loss")),
    Panel("kl", "KL to the reference", ("kl",), "nats per token"),
    Panel("entropy", "Entropy", ("entropy",), "nats per token", zero=True),
    Panel("length", "Completion length", ("completion_length/mean", "completion_length/max"), "tokens", zero=True),
    Panel("truncated", "Truncated completions", ("truncated",), "share", zero=True),
    Panel("variance", "Groups without variance", ("groups/no_variance",), "groups", zero=True),
    Panel("mismatch", "Trainer against engine", ("mismatch/mean", "mismatch/max"), "|Δ log-prob|", log=True),
    Panel("gradient", "Gradient norm", ("grad_norm",), zero=True),
    Panel("clip", "Clipped tokens", ("clip_fraction",), "share", zero=True),
    Panel("critic", "Variance of returns that the critic explains", ("value/explained_variance",), "share"),
    Panel("margins", "Chosen against rejected", ("rewards/chosen", "rewards/rejected", "rewards/margins", "margin")),
    Panel("preference", "Preference accuracy", ("rewards/accuracies",), zero=True),
    Panel("learning-rate", "Learning rate", ("learning_rate",), zero=True),
    Panel("throughput", "Throughput", ("tokens_per_second",), "tokens / s", zero=True),
)


@dataclass(frozen=True)
class Plot:
    """A drawn plot: its file, what it shows, and the stage it belongs to (none: the whole run)."""

    path: Path
    title: str
    stage: str | None = None
    wide: bool = False


def draw_plots(metrics: Sequence[Record], spans: Sequence[Span], folder: Path) -> list[Plot]:
    """Draw everything there is data for into `folder`, stage by stage and then the lanes of the workers."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[Plot] = []
    for stage in dict.fromkeys(str(m["stage"]) for m in metrics):
        records = sorted((m for m in metrics if m["stage"] == stage), key=lambda m: m["step"])
        plots += _stage_plots(stage, records, folder)
    return plots + _lane_plots(spans, folder)


def column(records: Iterable[Record], key: str) -> list[float]:
    """A metric over the records, NaN where it is missing or no number."""
    values = (record.get(key) for record in records)
    return [float(v) if isinstance(v, int | float) else math.nan for v in values]


def _stage_plots(stage: str, records: list[Record], folder: Path) -> list[Plot]:
    plots = []
    records = [r | {"accuracy": r[key]} if (key := _accuracy_key(r)) else r for r in records]
    if _has(records, "reward/mean"):
        path = folder / f"{stage}-reward.png"
        _draw_reward(records, path)
        plots.append(Plot(path, "Reward", stage))
    for panel in PANELS:
        if any(_has(records, key) for key in panel.keys):
            path = folder / f"{stage}-{panel.slug}.png"
            _draw_panel(panel, records, path)
            plots.append(Plot(path, panel.title, stage))
    if any(_has(records, f"seconds/{phase}") for phase in PHASES):
        path = folder / f"{stage}-time.png"
        _draw_time(records, path)
        plots.append(Plot(path, "Time of a step by role", stage, wide=True))
    return plots


def _lane_plots(spans: Sequence[Span], folder: Path) -> list[Plot]:
    if not spans:
        return []
    plots = [Plot(folder / "lanes.png", "Workers over the whole run", wide=True)]
    draw_lanes(spans, plots[0].title, plots[0].path)
    window = middle_steps(spans)
    if window:
        plots.append(Plot(folder / "lanes-steps.png", "Workers during a few steps", wide=True))
        draw_lanes(spans, plots[1].title, plots[1].path, window)
    return plots


def _has(records: list[Record], key: str) -> bool:
    return any(math.isfinite(v) for v in column(records, key))


def _accuracy_key(record: Record) -> str | None:
    """The reward that counts right answers, by its name; none where accuracy is logged already."""
    if "accuracy" in record:
        return None
    words = ("exact", "accuracy", "correct", "math")
    return next((key for key in record if key.startswith("reward/") and any(w in key for w in words)), None)


def _draw_panel(panel: Panel, records: list[Record], path: Path) -> None:
    figure, axes = new_figure(4.8, 2.5)
    keys = [key for key in panel.keys if _has(records, key)]
    for key, color in zip(keys, COLORS, strict=False):
        _curve(axes, records, key, color, label=key.rpartition("/")[2])
    if panel.log and all(v > 0 for key in keys for v in column(records, key) if math.isfinite(v)):
        axes.set_yscale("log")
    elif panel.zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05 or None)
    if len(keys) > 1:
        add_legend(axes)
    _step_axis(axes)
    finish_figure(figure, axes, panel.title, panel.unit, path)


def _draw_reward(records: list[Record], path: Path) -> None:
    """Mean and spread of the summed reward, and every part unweighted."""
    figure, axes = new_figure(4.8, 2.5)
    steps, mean, std = (column(records, key) for key in ("step", "reward/mean", "reward/std"))
    low = [m - s for m, s in zip(mean, std, strict=True)]
    high = [m + s for m, s in zip(mean, std, strict=True)]
    axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.12, linewidth=0, label="± std")
    _curve(axes, records, "reward/mean", COLORS[0], label="sum")
    known = dict.fromkeys(key for record in records for key in record if key.startswith("reward/"))
    parts = [key for key in known if key not in ("reward/mean", "reward/std")]
    for i, key in enumerate(parts):
        _curve(axes, records, key, COLORS[1 + i % (len(COLORS) - 1)], label=key.removeprefix("reward/"), width=1.1)
    add_legend(axes)
    _step_axis(axes)
    finish_figure(figure, axes, "Reward", "parts unweighted" if parts else "", path)


def _draw_time(records: list[Record], path: Path) -> None:
    """Seconds of each phase, stacked, a bar a step."""
    figure, axes = new_figure(9.8, 2.6)
    steps = column(records, "step")
    edges = [steps[0] - 0.5, *(step + 0.5 for step in steps)]
    base = [0.0] * len(steps)
    for phase, color in PHASES.items():
        if not _has(records, f"seconds/{phase}"):
            continue
        values = [0.0 if math.isnan(v) else v for v in column(records, f"seconds/{phase}")]
        top = [b + v for b, v in zip(base, values, strict=True)]
        axes.stairs(top, edges, baseline=base, fill=True, color=color, label=phase)
        base = top
    axes.set_xlim(edges[0], edges[-1])
    add_legend(axes)
    _step_axis(axes)
    finish_figure(figure, axes, "Time of a step by role", "seconds", path)


def _curve(axes: "Axes", records: list[Record], key: str, color: str, label: str, width: float = 1.7) -> None:
    points = [(x, y) for x, y in zip(column(records, "step"), column(records, key), strict=True) if math.isfinite(y)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    smooth = len(points) >= _SMOOTH_FROM
    marker = "o" if len(points) < 4 else None
    axes.plot(
        xs,
        ys,
        color=color,
        linewidth=0.8 if smooth else width,
        alpha=0.3 if smooth else 1,
        marker=marker,
        markersize=4,
        label="_raw" if smooth else label,
    )
    if smooth:
        axes.plot(xs, _running_mean(ys), color=color, linewidth=width, label=label)


def _running_mean(values: list[float]) -> list[float]:
    """A centred mean over about a twentieth of the points, shorter at the ends."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step", fontsize=8, color=MUTED)
