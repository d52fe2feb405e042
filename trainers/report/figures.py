"""How every plot looks: sizes, colours, titles, and the file it is written to."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
COLORS = ("#2f6db5", "#e0842b", "#2f9e77", "#8a63b8", "#c9514c", "#7d8894")
PHASES = {
    "generate": COLORS[0],
    "score": COLORS[2],
    "reference": COLORS[3],
    "values": "#a3617f",
    "update": COLORS[1],
    "publish": COLORS[4],
}
"""The colour of each phase of a step, the same in every plot."""
_DPI = 120


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of `width` by `height` inches: light grid, no frame. It belongs to no window and no global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    return figure, axes


def add_legend(axes: "Axes") -> None:
    """A legend between title and plot, in one line where it fits."""
    axes.legend(
        fontsize=8,
        frameon=False,
        labelcolor=MUTED,
        ncols=_legend_columns(axes),
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )


def finish_figure(figure: "Figure", axes: "Axes", title: str, unit: str, path: Path) -> None:
    """Put the title and the unit on, and write the file."""
    entries = len(axes.get_legend_handles_labels()[1]) if axes.get_legend() else 0
    pad = 8 + 14 * math.ceil(entries / _legend_columns(axes))
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=pad)
    if unit:
        axes.set_title(unit, loc="right", fontsize=8, color=MUTED, pad=pad)
    # Level 1: the files are small anyway, and the run waits for them.
    figure.savefig(path, pil_kwargs={"compress_level": 1})


def _legend_columns(axes: "Axes") -> int:
    return max(1, int(axes.get_figure(root=True).get_figwidth() / 1.1))  # pyright: ignore[reportOptionalMemberAccess]
