"""Two of the kill matrix's cells: the run ends as the undisturbed one does."""

from pathlib import Path

import pytest
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe

from benchmarks import trouble
from benchmarks.cells import Cell

CELLS = [
    Cell("SIGKILL", "critic", "update"),
    Cell("out of memory", "rollout", "generate"),
]


def test_a_death_and_a_lack_of_memory_leave_the_result_as_it_is(
    ray_session: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    smaller = ["stages.0.kl=null", "stages.0.rollout.workers=1", f"cluster.address={ray_session}"]
    recipe = trouble.write_recipe(tmp_path / "made", tiny_model, 2 * len(CELLS) + 1, *smaller)
    config = load_recipe(recipe)
    calm = open_run(config, tmp_path / "calm", named=True, resume=False)
    run_recipe(config, calm, read_inputs(config, calm.path), lambda _: None)
    told = trouble.suffer(recipe, tmp_path / "troubled", trouble.every_other_step(CELLS))
    assert trouble.differences(calm.path, tmp_path / "troubled/chaos") == {}
    assert [(t["role"], t["outcome"]) for t in told] == [(c.role, "healed") for c in CELLS]
