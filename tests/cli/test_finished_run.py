"""`raylign eval`, `merge` and `export` of what a run left, by the run's name."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from raylign.trainers.pipeline import Finished

from ..trainers.test_adapters import moved, save
from .conftest import Command


@pytest.fixture
def storage(tiny_model: Path, tmp_path: Path) -> Path:
    """One run whose last stage left an adapter, and one that has finished no stage."""
    _, adapter = save(moved(tiny_model), tiny_model, tmp_path)
    left = Finished("sft", "sft", 1, 1.0, {}, base=str(tiny_model), adapter=str(adapter))
    for name in ("done", "begun"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").write_text("")
    (tmp_path / "runs/done/progress.json").write_text(json.dumps([asdict(left)]))
    return tmp_path / "runs"


def test_a_run_is_measured_merged_and_exported_by_its_name(raylign: Command, storage: Path, tmp_path: Path) -> None:
    measured = raylign("eval", "done", "--storage", storage, "--json")
    assert measured.code == 0, measured.said
    found = json.loads(measured.out)
    assert found["forgetting"] == pytest.approx(found["general"]["loss"] - found["general"]["base_loss"])
    assert raylign("merge", "done", "--storage", storage, "--out", tmp_path / "merged").code == 0
    alone = json.loads(raylign("eval", tmp_path / "merged", "--json").out)
    assert alone["general"]["loss"] == pytest.approx(found["general"]["loss"], abs=1e-4)
    exported = raylign("export", "done", "--storage", storage, "--out", tmp_path / "out", "--json")
    assert exported.code == 0, exported.said
    assert all(form["agreement"] == 1 for form in json.loads(exported.out)["gate"])


def test_a_run_that_is_not_there_or_not_done_and_an_adapter_beside_one_are_refused(
    raylign: Command, storage: Path, tmp_path: Path
) -> None:
    assert raylign("eval", "dune", "--storage", storage).code == 4
    ended = raylign("merge", "begun", "--storage", storage, "--out", tmp_path / "x")
    assert (ended.code, "has no finished stage yet" in ended.said) == (2, True)
    ended = raylign("export", "done", "--adapter", "a", "--storage", storage, "--out", tmp_path / "x")
    assert (ended.code, "has its own" in ended.said) == (2, True)
