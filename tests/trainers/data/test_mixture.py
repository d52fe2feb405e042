"""Mixtures, splits and data sets on the hub: which rows a section of a recipe reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.data.mixture import load_data, repeated
from raylign.trainers.stages import DataConfig
from raylign.trainers.stages.base import SourceConfig, SplitConfig


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts(config: DataConfig, run: Path, seed: int = 0) -> list[str]:
    return [row["text"] for row in load_data(config, run, "text", seed).rows]


def test_a_weight_says_how_often_a_source_is_seen(tmp_path: Path) -> None:
    many = write(tmp_path / "many.jsonl", [f"m{i}" for i in range(10)])
    config = DataConfig(
        path=many, weight=0.5, mixture=(SourceConfig(path=write(tmp_path / "few.jsonl", ["a", "b"]), weight=2.5),)
    )
    loaded = load_data(config, tmp_path, "text", 3)
    got = [row["text"] for row in loaded.rows]
    assert [t[0] == "m" for t in got] == [True] * 5 + [False] * 5
    assert len(set(got[:5])) == 5
    assert got[5:9] == ["a", "b", "a", "b"]
    assert [(s.rows, s.taken, s.format) for s in loaded.sources] == [(10, 5, "text"), (2, 5, "text")]
    assert texts(config, tmp_path, 3) == got
    assert texts(config, tmp_path, 4) != got


def test_whole_weights_draw_nothing() -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}]
    assert repeated(rows, 2, "any") == rows * 2


def test_sides_of_a_split_are_disjoint_whole_and_stay_where_rows_come(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    names = [f"row {i}" for i in range(400)]
    write(path, names)
    sides = {
        take: texts(DataConfig(path=str(path), split=SplitConfig(held_out=0.25, take=take)), tmp_path)
        for take in ("train", "held_out")
    }
    assert sorted(sides["train"] + sides["held_out"]) == sorted(names)
    assert 70 < len(sides["held_out"]) < 130
    write(path, ["new", *reversed(names)])
    held_out = texts(DataConfig(path=str(path), split=SplitConfig(held_out=0.25, take="held_out")), tmp_path)
    assert set(held_out) - {"new"} == set(sides["held_out"])


def test_a_split_is_the_same_for_training_and_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(50)))
    data = {"path": str(path), "split": {"held_out": 0.3}}
    training = load_data(DataConfig.model_validate(data), tmp_path, "messages", 0).rows
    data["split"] = {"held_out": 0.3, "take": "held_out"}
    asked = load_data(DataConfig.model_validate(data), tmp_path, "prompt", 0).rows
    trained = {row["messages"][0]["content"] for row in training}
    assert len(trained) + len(asked) == 50
    assert not trained & {row["prompt"][0]["content"] for row in asked}


def test_what_is_left_of_nothing_is_refused(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path / "one.jsonl", ["a"]), weight=0.1)
    with pytest.raises(InputError, match="leave no rows"):
        load_data(config, tmp_path, "text", 0)


def test_a_data_set_in_the_hubs_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "datasets--org--set"
    (kept / "snapshots/abc/train").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    write(kept / "snapshots/abc/train/a.jsonl", ["one"])
    for path in ("hf://org/set", "hf://org/set/train"):
        assert texts(DataConfig(path=path), tmp_path) == ["one"]
    with pytest.raises(InputError, match="'hf://org/other' cannot be fetched from the hub"):
        load_data(DataConfig(path="hf://org/other"), tmp_path, "text", 0)
