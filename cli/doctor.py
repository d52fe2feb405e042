"""`raylign check --only data`: what is read, what is refused, and what the data doctor finds in it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .output import answer, notes, print_json, print_table


def show_data(config: Any, against: Sequence[Path], flag: Sequence[str], *, near: bool, json: bool) -> None:
    """Print the report of every stage's rows. Raises `InputError` for rows that are refused, once all is printed."""
    from ..trainers.data.examine import examine
    from ..trainers.data.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="raylign-check-") as folder:
        prepare(config, Path(folder))
        stages = examine(config, Path(folder), against, flag, near=near)
    facts = [stage.facts() for stage in stages]
    if json:
        print_json({"data": facts})
    else:
        for stage in facts:
            _print_stage(stage)
    for stage in stages:
        stage.proof.require()


def _print_stage(facts: dict[str, Any]) -> None:
    for source in facts["sources"]:
        answer.print(
            f"{facts['stage']}: {source['path']}: {source['rows']} rows of format {source['format']}, "
            f"{source['taken']} taken",
            highlight=False,
        )
    lengths = facts["doctor"]["lengths"]
    print_table("\ncharacters a row", ["up to", "rows"], [[end, count] for end, count in lengths.items()])
    found = facts["doctor"]["findings"]
    rows = [[name, f["count"], e["row"], e["seen"]] for name, f in found.items() for e in f["examples"][:2]]
    if rows:
        print_table("\nfound, and left in the data", ["what", "rows", "example", "seen"], rows)
    else:
        answer.print("nothing odd found")
    for refusal in facts["refusals"][:5]:
        notes.print(f"row {refusal['row']}: {refusal['reason']}", style="red", highlight=False)
