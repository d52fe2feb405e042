"""The kill matrix: the table is whole, and the page of results has it."""

import json
from pathlib import Path

from benchmarks.cells import Cell, all_cells, impossible, overview

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_cell_once_and_says_of_each_whether_it_can_happen() -> None:
    cells = all_cells()
    assert len(set(cells)) == 5 * 7 * 5
    reasons = [impossible(cell) for cell in cells]
    assert {reason: reasons.count(reason) for reason in sorted(set(reasons))} == {
        "": 107,
        "idle": 30,
        "of a process": 15,
        "writes nothing": 23,
    }


def test_every_cell_that_was_measured_can_happen_and_ended_as_the_undisturbed_run() -> None:
    cases = json.loads((ROOT / "benchmarks/results/chaos.json").read_text())["cases"]
    measured = [Cell(case["fault"], case["role"], case["phase"]) for case in cases]
    assert measured == [cell for cell in all_cells() if cell in measured and not impossible(cell)]
    assert all(case["equal"] for case in cases)
    assert all(overview(cases) in (ROOT / page).read_text() for page in ("README.md", "benchmarks/README.md"))
