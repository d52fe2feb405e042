"""The kill matrix: the table is whole, and a handful of its cells end as the undisturbed run does."""

from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.cells import Cell, all_cells, impossible

CELLS = [
    Cell("SIGKILL", "policy", "update"),
    Cell("SIGKILL", "rollout", "generate"),
    Cell("exception", "reward", "score"),
    Cell("SIGKILL", "controller", "publish"),
    Cell("out of memory", "policy", "checkpoint"),
]


def test_the_table_has_every_cell_once_and_says_of_each_whether_it_can_happen() -> None:
    cells = all_cells()
    assert len(set(cells)) == 5 * 5 * 5
    reasons = [impossible(cell) for cell in cells]
    assert {reason: reasons.count(reason) for reason in sorted(set(reasons))} == {
        "": 80,
        "idle": 26,
        "writes nothing": 19,
    }


def test_faults_of_every_kind_leave_the_result_as_it_is(
    ray_session: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = chaos.write_recipe(tmp_path / "made", tiny_model, chaos.steps_of(CELLS), ray_session, reference=False)
    chaos.suffer(recipe, tmp_path / "calm", [])
    told = chaos.suffer(recipe, tmp_path / "troubled", CELLS)
    assert chaos.differences(tmp_path / "calm/chaos", tmp_path / "troubled/chaos") == {}
    assert [(t["role"], t["outcome"]) for t in told] == [(c.role, "healed") for c in CELLS]
