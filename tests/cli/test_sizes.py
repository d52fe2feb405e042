"""Recipes of a size: `check` accepts each on the nodes that its own first lines name, and refuses it on fewer."""

import re
import shlex
from pathlib import Path

import pytest

from .conftest import Command

SIZES = sorted((Path(__file__).parents[2] / "recipes" / "sizes").glob("*.yaml"))
SIZE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "Qwen/Qwen3-0.6B": dict(zip(SIZE, (1024, 3072, 28, 16), strict=True)),
    "Qwen/Qwen3-8B": dict(zip(SIZE, (4096, 12288, 36, 32), strict=True)),
}
"""Of the models' own config.json files."""


def config_folder(recipe: Path, folder: Path) -> Path:
    """A folder with the config.json of the recipe's model."""
    from transformers import Qwen3Config

    (name,) = re.findall(r"path: (Qwen/[\w.-]+)", recipe.read_text())
    common = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": "0.6" in name}
    Qwen3Config(**SHAPES[name], **common, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", SIZES, ids=lambda path: path.stem)
def test_check_accepts_it_on_the_nodes_that_it_names(recipe: Path, raylign: Command, tmp_path: Path) -> None:
    (line,) = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# raylign check")]
    words = shlex.split(line)
    assert words[2] == f"recipes/sizes/{recipe.name}"
    model = f"model.path={config_folder(recipe, tmp_path / 'model')}"
    accepted = raylign("check", recipe, *words[3:], "--set", model)
    assert accepted.code == 0, accepted.err
    for node, why in (("1x4,16gb", "does not fit"), ("1x512,4096gb,64xT4", "the largest GPU has 16.0 GB")):
        refused = raylign("check", recipe, "--only", "plan", "--node", node, "--set", model)
        assert refused.code == 3
        assert why in refused.said


@pytest.mark.parametrize("text", ["", "8", "8x", "8x16,gpu", "8x16,64gb,2xH10", "x16", "-1x16"])
def test_nodes_that_are_not_described_are_refused(raylign: Command, text: str) -> None:
    ended = raylign("check", SIZES[0], "--only", "placement", "--node", text)
    assert (ended.code, "write COUNTxCPUS,MEMORYgb,GPUSxCARD" in ended.said) == (2, True)


def test_nodes_are_for_a_plan_or_placement(raylign: Command) -> None:
    assert "--node describes nodes for --only plan" in raylign("check", SIZES[0], "--node", "1x2").said
