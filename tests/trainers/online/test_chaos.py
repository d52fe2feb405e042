"""Two of the kill matrix's cells: the run ends as the undisturbed one does."""

from pathlib import Path

import pytest

from benchmarks import trouble
from benchmarks.cells import Cell

from .conftest import Train

CELLS = [
    Cell("SIGKILL", "critic", "update"),
    Cell("out of memory", "reward", "score"),
]


def test_a_death_and_a_lack_of_memory_leave_the_result_as_it_is(
    train_here: Train, ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = train_here("chaos", "ppo", steps=2 * len(CELLS) + 1, checkpoint_every=2)
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    monkeypatch.chdir(Path(__file__).parents[3])
    told = trouble.suffer(tmp_path / "chaos.yaml", tmp_path / "troubled", trouble.every_other_step(CELLS))
    assert trouble.differences(calm.path, tmp_path / "troubled/chaos") == {}
    assert [(t["role"], t["outcome"]) for t in told] == [(c.role, "healed") for c in CELLS]
