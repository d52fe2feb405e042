"""The kill matrix: the table is whole."""

from benchmarks.cells import all_cells, impossible


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
