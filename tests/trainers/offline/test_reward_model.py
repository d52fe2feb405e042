"""A reward model, from pairs to the rewards of a later stage: whole runs on a tiny random model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.data.template import load_tokenizer
from raylign.trainers.launch import open_run
from raylign.trainers.pipeline import finished, run_recipe
from raylign.trainers.recipe import load_recipe

RECIPE = """\
name: rlhf
seed: 5
model: {{path: {model}}}
stages:
  - type: sft
    adapter: {{type: lora, r: 4}}
    data: {{path: turns.jsonl}}
    steps: 2
    batch_size: 8
    learning_rate: 1e-3
  - type: reward_model
    name: taste
    adapter: {{type: lora, r: 4}}
    data: {{path: pairs.jsonl}}
    held_out: {{path: held_out.jsonl}}
    steps: 30
    batch_size: 8
    learning_rate: 1e-2
    checkpoint_every: 5
  - type: grpo
    data: {{path: prompts.jsonl}}
    steps: 2
    batch_size: 16
    rollout:
      workers: 1
      group_size: 8
      sampling: {{max_tokens: 12}}
      max_prompt_tokens: 40
    rewards: [{{type: model, stage: taste}}, {{type: format, pattern: "[^a]*", name: plain, weight: 0.5}}]
"""


def turn(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def pair(n: int) -> dict[str, str]:
    """Vowels are wanted, in answers of unlike length."""
    return {"prompt": f"word {n}", "chosen": "aeiou"[n % 5] * (2 + n % 4), "rejected": "xzkqt"[n % 5] * (2 + n % 3)}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf")
    write(folder / "turns.jsonl", [turn(f"word {n}", "aeiou"[n % 5]) for n in range(16)])
    write(folder / "pairs.jsonl", [pair(n) for n in range(60)])
    write(folder / "held_out.jsonl", [pair(n) for n in range(100, 130)])
    write(folder / "prompts.jsonl", [{"prompt": f"word {n}"} for n in range(10)])
    path = folder / "rlhf.yaml"
    path.write_text(RECIPE.format(model=tiny_model))
    return path


def start(recipe: Path, storage: Path, *overrides: str, act: Callable[[RunDir], None] | None = None) -> Any:
    config = load_recipe(recipe, overrides)
    run = open_run(config, storage, named=True, resume=True)
    if act:
        act(run)
    return run, run_recipe(config, run, read_inputs(config, run.path), lambda _: None)


@pytest.fixture(scope="module")
def rlhf(recipe: Path, ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    return start(recipe, tmp_path_factory.mktemp("runs"))


def test_the_reward_model_learns_what_is_preferred(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    run, summary = rlhf
    assert summary["status"] == "succeeded"
    curve = [m for m in run.all_metrics() if m["stage"] == "taste"]
    assert len(curve) == 30
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    metrics = summary["stages"][1]["metrics"]
    assert metrics["held_out/accuracy"] > 0.9
    assert metrics["accuracy"] > 0.9
    assert metrics["held_out/margin"] > 0
    assert metrics["margin"] > 0
