"""`report.html`: one file that shows what a run did; nothing in it is fetched from anywhere.

It can be written at any time, also while the run goes on. Everything that comes from the recipe or the run is escaped.
"""

import base64
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...cluster.rundir import RunDir, write_atomically
from .page import STYLE, badge, card, details, grid, page, table
from .plots import Plot, draw_plots

Record = dict[str, Any]

_SHOWN = (
    "accuracy",
    "reward/mean",
    "kl",
    "entropy",
    "loss",
    "eval_loss",
    "completion_length/mean",
    "rewards/accuracies",
    "held_out/accuracy",
)
_EVENTS = 60
"""The last so many events are listed."""


def write_report(run: RunDir) -> Path:
    """Draw `plots/*.png` and write `report.html` from what the run has left so far; returns the report's path.

    Reads recipe.yaml, metrics.jsonl, events.jsonl, status.json and summary.json; each may be missing.
    """
    metrics, events = run.all_metrics(), run.events()
    spans = [e for e in events if e["kind"] == "span"]
    plots = draw_plots(metrics, spans, run / "plots")
    summary, status = run.summary(), run.status()
    body = [
        _headline(run, summary, status, metrics, events),
        _evaluation(summary.get("evaluation") or {}),
        _stages(summary.get("stages") or _stages_so_far(metrics)),
        *_plot_sections(plots),
        _events([e for e in events if e["kind"] != "span"]),
        _recipe(run / "recipe.yaml"),
    ]
    path = run / "report.html"
    write_atomically(path, page(run.name, STYLE, "\n".join(body)))
    return path


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` trials (Wilson 1927)."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def number(value: object) -> str:
    """A number as a reader wants it: four digits that matter."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6 if math.isfinite(value) else False):
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _headline(run: RunDir, summary: Record, status: Record, metrics: list[Record], events: list[Record]) -> str:
    state = str(summary.get("status") or status.get("status") or "unknown")
    facts = [("Seed", summary.get("seed")), ("Duration", _took(summary, metrics, events))]
    if not summary:
        facts.append(
            ("Stage", f"{status.get('stage', '–')}, step {status.get('step', '–')} of {status.get('steps', '–')}")
        )
    workers = summary.get("workers") or {}
    least, most = workers.get("min"), workers.get("max")
    if most:
        facts.append(("Rollout workers", f"{least}" if least == most else f"{least} – {most}"))
    weights, served = summary.get("weights") or {}, summary.get("served") or {}
    facts += [
        ("Peak memory", f"{number(summary['peak_memory_gb'])} GB" if summary.get("peak_memory_gb") else None),
        ("Restarts", summary.get("restarts")),
        ("Repeatable", "closely, not bit for bit" if summary.get("exact") is False else None),
        ("Weights", f"v{weights['version']} · {str(weights.get('digest'))[:12]}" if weights.get("version") else None),
        ("Served as", served.get("model")),
    ]
    cards = "".join(card(label, str(value)) for label, value in facts if value is not None)
    why = summary.get("reason") or status.get("reason")
    reason = f'<p class="reason">{escape(str(why))}</p>' if why else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        f"<header><h1>{escape(run.name)} {badge(state)}</h1>"
        f'<p class="muted">written {escape(written)}</p></header>{reason}<div class="cards">{cards}</div>'
    )


def _took(summary: Record, metrics: list[Record], events: list[Record]) -> str | None:
    if summary.get("wall_seconds"):
        return duration(summary["wall_seconds"])
    times = [r["time"] for r in (*metrics, *events)]
    return duration(max(times) - min(times)) if times else None


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    models = evaluation.get("models") or {k: evaluation[k] for k in ("before", "after") if evaluation.get(k)}
    models = {name: scores for name, scores in models.items() if isinstance(scores, dict)}
    if not models:
        return ""
    names = {"greedy": "greedy", "t1": "T = 1"}
    columns = list(
        dict.fromkeys(k for s in models.values() for k, v in s.items() if k not in ("n", "errors") and _is_number(v))
    )
    head = ["model", *(names.get(c, c) for c in columns), "questions"]
    rows = [
        [escape(name), *(_share(scores.get(c), scores.get("n")) for c in columns), number(scores.get("n", "–"))]
        for name, scores in models.items()
    ]
    note = '<p class="muted">share of right answers on held-out questions, with its 95 % interval</p>'
    return f"<section><h2>Evaluation</h2>{note}{table(head, rows)}{_examples(models)}</section>"


def _examples(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The first answers of every model, folded away."""
    rows = [
        [escape(name), *(f"<pre>{escape(str(text))}</pre>" for text in (_question(e), e.get("answer", ""))), mark]
        for name, scores in models.items()
        for e in scores.get("examples") or []
        for mark in [escape(number(e.get("grade", "–")))]
    ]
    return details("Examples", table(["model", "question", "answer", "grade"], rows)) if rows else ""


def _question(example: Mapping[str, Any]) -> str:
    prompt = example.get("prompt", "")
    return str(prompt[-1].get("content", "")) if isinstance(prompt, list) and prompt else str(prompt)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(value: object, n: object) -> str:
    """A share as a percentage with a bar and, where `n` is known, its interval."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        return escape(number(value)) if value is not None else "–"
    interval = ""
    if isinstance(n, int) and n > 0:
        low, high = wilson(value, n)
        interval = f' <span class="muted">{100 * low:.0f}–{100 * high:.0f}</span>'
    bar = f'<span class="bar"><i style="width:{100 * value:.1f}%"></i></span>'
    return f"{bar}<b>{100 * value:.1f} %</b>{interval}"


def _stages_so_far(metrics: Iterable[Record]) -> list[Record]:
    last: dict[str, Record] = {}
    first: dict[str, float] = {}
    for m in metrics:
        last[m["stage"]] = m
        first.setdefault(m["stage"], m["time"])
    return [
        {"type": stage, "steps": m["step"], "seconds": m["time"] - first[stage], "metrics": m}
        for stage, m in last.items()
    ]


def _stages(stages: Sequence[Record]) -> str:
    if not stages:
        return ""
    rows = [
        [
            escape(str(s.get("name") or s.get("type", "–"))),
            number(s.get("steps", "–")),
            duration(s["seconds"]) if isinstance(s.get("seconds"), int | float) else "–",
            _last(s.get("metrics") or {}),
        ]
        for s in stages
    ]
    return f"<section><h2>Stages</h2>{table(['stage', 'steps', 'time', 'last metrics'], rows)}</section>"


def _last(metrics: Mapping[str, Any]) -> str:
    shown = [key for key in _SHOWN if key in metrics]
    return " ".join(f'<span class="pill">{escape(key)} <b>{escape(number(metrics[key]))}</b></span>' for key in shown)


def _plot_sections(plots: Sequence[Plot]) -> list[str]:
    sections = []
    for stage in dict.fromkeys(p.stage for p in plots):
        images = [(_image(p), p.wide) for p in plots if p.stage == stage]
        title = "Workers over time" if stage is None else f"Stage {stage}"
        sections.append(f"<section><h2>{escape(title)}</h2>{grid(images)}</section>")
    return sections


def _image(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode()
    return f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'


def _events(events: Sequence[Record]) -> str:
    if not events:
        return ""
    rows = [
        [
            time.strftime("%H:%M:%S", time.localtime(e["time"])),
            escape(str(e["kind"])),
            escape(", ".join(f"{k} {number(v)}" for k, v in e.items() if k not in ("time", "kind"))),
        ]
        for e in events[-_EVENTS:]
    ]
    return details(f"Events ({len(events)})", table(["time", "event", ""], rows))


def _recipe(path: Path) -> str:
    return details("Recipe", f"<pre>{escape(path.read_text())}</pre>") if path.exists() else ""
