"""The pieces of HTML a report is put together from. Cells and bodies are HTML already; everything else is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { --ink: #1f2933; --muted: #66727f; --line: #e4e8ec; --accent: #2f6db5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 0 0 12px; }
.muted { color: var(--muted); font-size: 13px; }
.badge { font-size: 13px; font-weight: 600; padding: 3px 10px; border-radius: 99px; vertical-align: 4px;
         background: #e8ecf0; color: var(--muted); }
.badge.succeeded { background: #dff3ea; color: #1c7a58; }
.badge.failed { background: #fbe4e2; color: #b13a34; }
.badge.running { background: #e1ecf8; color: var(--accent); }
.badge.stopped { background: #fdf0dc; color: #9a5f10; }
.reason { background: #fff; border-left: 4px solid #c9514c; padding: 10px 14px; border-radius: 4px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0 20px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 110px; }
.card b { display: block; font-size: 17px; font-variant-numeric: tabular-nums; }
section, details { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px;
                   margin-bottom: 20px; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: 13px; color: var(--muted); }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.pill { display: inline-block; background: #f1f4f7; border-radius: 6px; padding: 0 8px; margin: 1px 2px;
        font-size: 13px; }
.bar { display: inline-block; width: 90px; height: 8px; margin-right: 10px; border-radius: 4px;
       background: var(--line); }
.bar i { display: block; height: 8px; border-radius: 4px; background: var(--accent); }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.grid .wide { grid-column: 1 / -1; }
.grid img { display: block; max-width: 100%; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.45; }
td pre { margin: 0; white-space: pre-wrap; }
section details { border: 0; padding: 12px 0 0; margin: 0; }
@media (max-width: 760px) { .grid { grid-template-columns: 1fr; } }
"""


def page(title: str, style: str, body: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def badge(state: str) -> str:
    """A coloured word for the state of a run."""
    known = state if state in ("succeeded", "failed", "stopped", "running") else ""
    return f'<span class="badge {known}">{escape(state)}</span>'


def card(label: str, value: str) -> str:
    """A fact with its label."""
    return f'<div class="card"><span class="muted">{escape(label)}</span><b>{escape(value)}</b></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def grid(images: Iterable[tuple[str, bool]]) -> str:
    """Images in two columns; a wide one takes both."""
    return '<div class="grid">' + "".join(f'<div class="{"wide" if w else ""}">{i}</div>' for i, w in images) + "</div>"


def details(title: str, body: str) -> str:
    """A part that opens on a click; its body is HTML."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
