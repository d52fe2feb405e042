"""`raylign check --only plan|placement`: a config.json is enough, and what does not fit is refused with exit code 3."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Command

RECIPE = """\
name: small
model: {{path: {model}, dtype: {dtype}}}
stages:
  - {{type: sft, data: {{path: none.jsonl}}, steps: 5, batch_size: 4, max_length: 64, workers: {workers}}}
"""


@pytest.fixture
def config_only(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    return folder


def write(folder: Path, tmp_path: Path, *, dtype: str = "float32", workers: int = 1) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(model=folder, dtype=dtype, workers=workers))
    return path


def test_a_plan_needs_no_data_and_no_weights(raylign: Command, config_only: Path, tmp_path: Path) -> None:
    ended = raylign("check", write(config_only, tmp_path), "--only", "plan", "--json")
    assert ended.code == 0, ended.err
    (stage,) = json.loads(ended.out)["plan"]["stages"]
    assert (stage["type"], stage["steps"], stage["tokens"]) == ("sft", 5, 5 * 4 * 64)
    assert stage["total_gb"] == pytest.approx(stage["parameters"] * 16 / 1e9, abs=1e-3)
    assert stage["per_device_gb"] == pytest.approx(sum(stage["items"].values()), abs=2e-3)
    assert stage["seconds"] is not None
    assert "weights" in raylign("check", write(config_only, tmp_path), "--only", "plan").out


def test_workers_have_a_model_each(raylign: Command, config_only: Path, tmp_path: Path) -> None:
    def total(workers: int) -> float:
        ended = raylign("check", write(config_only, tmp_path, workers=workers), "--only", "plan", "--json")
        return json.loads(ended.out)["plan"]["stages"][0]["roles"][0]["devices"]

    assert (total(1), total(4)) == (1, 4)


def test_what_no_node_can_hold_is_exit_code_3_after_its_numbers(
    raylign: Command, config_only: Path, tmp_path: Path
) -> None:
    config = json.loads((config_only / "config.json").read_text())
    wide = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 8, "head_dim": 128}
    (config_only / "config.json").write_text(json.dumps(config | wide | {"num_attention_heads": 128}))
    ended = raylign("check", write(config_only, tmp_path), "--only", "plan", "--json")
    assert ended.code == 3
    assert json.loads(ended.out)["plan"]["stages"][0]["total_gb"] > 400
    assert "stage sft: train needs" in ended.said
    assert "the largest node has" in ended.said


def test_a_dtype_that_the_stage_cannot_compute_in_is_planned_and_said(
    raylign: Command, config_only: Path, tmp_path: Path
) -> None:
    recipe = write(config_only, tmp_path, dtype="bfloat16")
    (stage,) = json.loads(raylign("check", recipe, "--only", "plan", "--json").out)["plan"]["stages"]
    assert "refuses model.dtype bfloat16 for sft" in stage["assumes"][0]
    assert raylign("check", recipe).code == 2


def test_placement_alone(raylign: Command, config_only: Path, tmp_path: Path) -> None:
    recipe = write(config_only, tmp_path)
    asked = json.loads(raylign("check", recipe, "--only", "placement", "--json").out)["placement"]["asked"]
    assert asked == [{"stage": "sft", "role": "train worker", "count": 1, "each": "1 CPU"}]
    ended = raylign("check", recipe, "--only", "placement", "--set", "stages.0.resources.gpus=8")
    assert ended.code == 3
    assert "does not fit" in ended.said


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "no_such_model"}'])
def test_a_bad_config_is_one_line(raylign: Command, config_only: Path, tmp_path: Path, text: str | None) -> None:
    path = config_only / "config.json"
    path.unlink() if text is None else path.write_text(text)
    ended = raylign("check", write(config_only, tmp_path), "--only", "plan")
    assert ended.code == 2
    assert "config.json" in ended.said


def test_a_run_is_refused_where_its_memory_is_not_there(
    raylign: Command, tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_grpo("wide", stages__0__rollout__slots=500_000_000, cluster__cpus=8)
    for verb in ("check", "run"):
        ended = raylign(verb, recipe)
        assert ended.code == 3, ended.err
        assert "rollout needs" in ended.said
        assert "lower rollout.slots" in ended.said
    assert not (tmp_path / "runs" / "wide").exists()


def test_rows_count_and_not_the_longest_that_a_recipe_would_take(
    raylign: Command, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = write(tiny_model, tmp_path)
    spoken = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "none.jsonl").write_text(json.dumps({"messages": spoken}) + "\n")
    allowed = "stages.0.max_length=2000000"
    assert raylign("check", recipe, "--only", "plan", "--set", allowed).code == 3
    assert raylign("check", recipe, "--set", allowed).code == 0
