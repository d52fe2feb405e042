"""A handful of the kill matrix's cells: the run ends as the undisturbed one does."""

from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.cells import Cell

CELLS = [
    Cell("SIGKILL", "policy", "update"),
    Cell("SIGKILL", "rollout", "generate"),
    Cell("exception", "reward", "score"),
    Cell("SIGKILL", "controller", "publish"),
    Cell("out of memory", "policy", "checkpoint"),
]


def test_faults_of_every_kind_leave_the_result_as_it_is(
    ray_session: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    recipe = chaos.write_recipe(tmp_path / "made", tiny_model, chaos.steps_of(CELLS), ray_session, reference=False)
    chaos.suffer(recipe, tmp_path / "calm", [])
    told = chaos.suffer(recipe, tmp_path / "troubled", CELLS)
    assert chaos.differences(tmp_path / "calm/chaos", tmp_path / "troubled/chaos") == {}
    assert [(t["role"], t["outcome"]) for t in told] == [(c.role, "healed") for c in CELLS]
