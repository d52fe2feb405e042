"""A reward model, from pairs to the rewards of a later stage: whole runs on a tiny random model."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest
from raylign.rollout.rewards.model import RewardModel
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.data.template import encode_prompt, load_tokenizer
from raylign.trainers.launch import open_run
from raylign.trainers.model_state import ModelState, starting_model
from raylign.trainers.offline.stage import run_offline_stage
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
    data: {{path: pairs.jsonl}}
    held_out: {{path: held_out.jsonl}}
    steps: 30
    batch_size: 8
    learning_rate: 3e-3
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


@pytest.fixture(scope="module")
def rlhf(recipe: Path, ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    config = load_recipe(recipe)
    run = open_run(config, tmp_path_factory.mktemp("runs"), named=True, resume=False)
    return run, run_recipe(config, run, read_inputs(config, run.path), lambda _: None)


def test_the_reward_model_learns_what_is_preferred(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    run, summary = rlhf
    assert summary["status"] == "succeeded"
    curve = [m for m in run.all_metrics() if m["stage"] == "taste"]
    assert len(curve) == 30
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    metrics = summary["stages"][1]["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["held_out/accuracy"] > 0.9, "chance is 0.5"
    assert min(metrics["margin"], metrics["held_out/margin"]) > 0


def test_it_leaves_a_model_folder_and_the_policy_as_it_was(
    rlhf: tuple[RunDir, dict[str, Any]], tiny_model: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    run, _ = rlhf
    sft, taste, grpo = finished(run)
    folder = run / "models" / "1-taste"
    assert taste.reward_model == str(folder)
    assert taste.digest == base_digest(folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    assert load_tokenizer(folder).decode([2]) == "<|im_end|>"

    assert (taste.base, taste.adapter) == (sft.base, sft.adapter) == (str(tiny_model), sft.adapter)
    assert {row["digest"] for row in samples(run, 0)} == {sft.digest}
    assert grpo.base == sft.base


def samples(run: RunDir, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / f"samples/grpo/step-{step:06d}.parquet").to_pylist()


def test_its_rewards_are_those_of_the_saved_model(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    run, _ = rlhf
    folder = run / "models" / "1-taste"
    tokenizer, model = load_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = samples(run, 0) + samples(run, 1)
    assert len(rows) == 32
    for row in rows:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        with torch.no_grad():
            score = float(model(torch.tensor([[*prompt, *row["tokens"]]])).logits)
        assert row["reward/taste"] == pytest.approx(score, abs=1e-5)
        assert row["reward"] == pytest.approx(score + 0.5 * ("a" not in row["completion"]), abs=1e-5)
    assert len({row["reward/taste"] for row in rows}) > 16, "one number for all teaches nothing"


def test_the_held_out_measure_is_a_count_of_pairs(rlhf: tuple[RunDir, dict[str, Any]], recipe: Path) -> None:
    run, summary = rlhf
    held_out = read_inputs(load_recipe(recipe), run.path).stages[1].held_out
    assert len(held_out) == 30
    model = RewardModel(run / "models" / "1-taste")
    rows = [[np.array(p.prompt_ids + ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in held_out]
    margins = [chosen - rejected for chosen, rejected in map(model.scores, rows)]
    metrics = summary["stages"][1]["metrics"]
    assert metrics["held_out/accuracy"] == sum(m > 0 for m in margins) / 30
    assert metrics["held_out/margin"] == pytest.approx(sum(margins) / 30, abs=1e-5)


def test_a_resume_from_the_last_good_checkpoint_makes_the_same_model(
    rlhf: tuple[RunDir, dict[str, Any]], recipe: Path
) -> None:
    """The machine lost power before the stage was noted as done; the newest checkpoint was not whole on disk."""
    run, summary = rlhf
    config, done = load_recipe(recipe), finished(run)
    stage, before = config.stages[1], ModelState(Path(done[0].base), Path(done[0].adapter or ""))
    newest = run / "checkpoints/1-taste/step-000030/model.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    shutil.rmtree(run / "models/1-taste")
    given = read_inputs(config, run.path).stages[1]
    start = starting_model(stage, 1, before, run)
    with ThreadPoolExecutor(1) as thread:  # off the main thread, as the pipeline does
        again = thread.submit(
            run_offline_stage,
            stage,
            index=1,
            model=start,
            encoded=given.proof.require(),
            held_out=given.held_out,
            seed=config.seed,
            run_dir=run,
        ).result()
    assert [e["checkpoint"] for e in run.events("checkpoint_refused")] == ["step-000030"]
    assert again.reward_model == run / "models/1-taste"
    assert base_digest(again.reward_model) == done[1].digest
    assert again.metrics == summary["stages"][1]["metrics"]
