"""Which paths of a recipe a job needs besides the recipe's folder."""

from pathlib import Path

from raylign.trainers.recipe import load_recipe
from raylign.trainers.shipping import as_overrides, outside_paths, paths_as_written

RECIPE = """\
name: mine
model: {path: ../models/base}
stages:
  - type: sft
    data: {path: rows.jsonl}
  - type: grpo
    data: {path: /shared/prompts.jsonl}
    rewards:
      - {type: function, path: "rewards.py:exact"}
      - {type: function, path: "../common.py:short"}
      - {type: function, path: "package.module:f"}
"""


def test_paths_that_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = folder / "mine.yaml"
    recipe.write_text(RECIPE)

    outside = outside_paths(load_recipe(recipe), folder)
    assert outside == {
        "model.path": str(tmp_path / "models" / "base"),
        "stages.1.data.path": "/shared/prompts.jsonl",
        "stages.1.rewards.1.path": f"{tmp_path}/common.py:short",
    }
    moved = tmp_path / "elsewhere" / "mine.yaml"
    moved.parent.mkdir()
    moved.write_text(RECIPE)
    config = load_recipe(moved, as_overrides(outside))
    assert config.model.path == str(tmp_path / "models" / "base")
    assert outside_paths(config, moved.parent) == outside

    written = paths_as_written(recipe, ["stages.0.data.path=/other.jsonl"])
    assert written["model.path"] == "../models/base"
    assert written["stages.0.data.path"] == "/other.jsonl"
