"""`raylign top`: the runs of a storage, live."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import answer, print_json
from .run import JsonOption, StorageOption

if TYPE_CHECKING:
    from rich.console import RenderableType


def top(
    run: Annotated[str | None, typer.Argument(help="A run's name; all runs without it.")] = None,
    storage: StorageOption = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show one look and end; on a pipe always.")] = False,
    json: JsonOption = False,
) -> None:
    """Show runs, their workers, phases and curves, until Ctrl-C.

    Example: raylign top
    """
    from ..trainers.report.live import overview

    root = (storage or Path("runs")).resolve()
    if json:
        return print_json(overview(root, run))
    if once or not answer.is_terminal:
        return answer.print(_frame(overview(root, run), answer.width), highlight=False)
    from rich.live import Live

    with Live(console=answer, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_frame(overview(root, run), answer.width), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt:
            return None


def _frame(found: list[dict[str, Any]], width: int) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    if not found:
        return Text("no runs here yet: raylign run RECIPE starts one")
    return Group(*(_run(facts, width) for facts in found))


def _run(facts: dict[str, Any], width: int) -> "RenderableType":
    """One run: where it is, and while it is at work its curves, phases and what it waits for."""
    from rich.console import Group
    from rich.text import Text

    lines = [_headline(facts)]
    if facts["reason"]:
        lines.append(Text(f"  {facts['reason']}", style="dim"))
    if facts["status"] == "running":
        lines += [Text(f"  {line}") for line in _details(facts, width)]
    return Group(*lines)


def _headline(facts: dict[str, Any]) -> Any:
    from rich.text import Text

    colour = {"running": "green", "failed": "red", "lost": "red", "damaged": "red"}.get(facts["status"], "dim")
    place = f"  {facts['stage']} {facts['step']}/{facts['steps']}" if facts["stage"] else ""
    workers = ", ".join(f"{role} {count}{_wanted(facts, role)}" for role, count in facts["workers"].items() if count)
    alarms = f"  alarm: {', '.join(facts['alarms'])}" if facts["alarms"] else ""
    return Text.assemble(
        (facts["run"], "bold"),
        "  ",
        (facts["status"], colour),
        place,
        f"  {workers}" if workers else "",
        (alarms, "red"),
    )


def _wanted(facts: dict[str, Any], role: str) -> str:
    wanted = facts["wanted"].get(role)
    return f" of {wanted}" if wanted is not None and wanted != facts["workers"][role] else ""


def _details(facts: dict[str, Any], width: int) -> list[str]:
    from ..trainers.report.live import sparkline

    room = max(0, min(60, width - 36))
    shown = [f"{key:20} {values[-1]:>10.4g} {sparkline(values, room)}" for key, values in facts["curves"].items()]
    if facts["seconds"]:
        shown.append("seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in facts["seconds"].items()))
    if facts["groups"]:
        shown.append("groups: " + ", ".join(f"{count} {state}" for state, count in facts["groups"].items()))
    if facts["waiting"]:
        oldest = min(facts["waiting"], key=lambda wait: wait["since"])
        shown.append(f"waits {time.time() - oldest['since']:.1f} s for {oldest['what']} {oldest['actor']}".rstrip())
    return shown
