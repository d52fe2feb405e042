"""`raylign merge` on the command line."""

import json
from pathlib import Path

from .conftest import Command


def test_models_are_merged_and_a_folder_that_is_there_is_refused(
    raylign: Command, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    ended = raylign("merge", tiny_model, tiny_model, "--how", "slerp", "--out", out, "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"out": str(out), "how": "slerp"})
    assert (out / "model.safetensors").is_file()
    again = raylign("merge", tiny_model, tiny_model, "--how", "slerp", "--out", out)
    assert (again.code, "is there already" in again.said) == (2, True)
    assert raylign("merge", tiny_model, tmp_path / "none", "--out", tmp_path / "x").code == 2
    assert raylign("merge", tiny_model, tiny_model, tiny_model, "--out", tmp_path / "x").code == 2
