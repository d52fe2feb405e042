"""A reward model, from pairs to the rewards of a later stage: `recipes/rlhf.yaml` from SFT on in a few steps."""

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
from raylign.trainers.config import ModelConfig, RunConfig
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.data.prepare import prepare
from raylign.trainers.data.template import encode_prompt, load_tokenizer
from raylign.trainers.model_state import ModelState, starting_model
from raylign.trainers.offline.stage import run_offline_stage
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import finished, run_recipe
from raylign.trainers.recipe import load_recipe
from raylign.trainers.stages import RewardModelStage

RECIPE = Path(__file__).parents[3] / "recipes/rlhf.yaml"
SMALL = [
    "prepare.options={documents: 64, demonstrations: 64, prompts: 64, preferences: 8, questions: 8}",
    "stages.1.steps=2",
    "stages.1.batch_size=8",
    "stages.1.workers=1",
    "stages.2.workers=1",
    "stages.2.steps=30",
    "stages.2.batch_size=8",
    "stages.2.checkpoint_every=5",
    "stages.3.steps=2",
    "stages.3.batch_size=16",
    "stages.3.warmup_steps=0",
    "stages.3.critic.stage=reward_model",
    "stages.3.rollout.workers=1",
    "stages.3.rollout.max_prompt_tokens=40",
    "evaluation=null",
    "serve=null",
]


def pair(n: int) -> dict[str, str]:
    """Answers of ones are wanted and of nines are not; both are of unlike length."""
    return {"prompt": f"{n}+{n}", "chosen": "=" + "1" * (1 + n % 4), "rejected": "=" + "9" * (1 + n % 3)}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The shipped recipe on a base that is there already, in a few steps, with pairs that a few steps tell apart."""
    folder = tmp_path_factory.mktemp("pairs")
    write(folder / "pairs.jsonl", [pair(n) for n in range(60)])
    write(folder / "held_out.jsonl", [pair(n) for n in range(100, 130)])
    paths = [f"stages.2.data.path={folder}/pairs.jsonl", f"stages.2.held_out.path={folder}/held_out.jsonl"]
    whole = load_recipe(RECIPE, [*SMALL, *paths])
    return whole.model_copy(update={"model": ModelConfig(path=str(tiny_model)), "stages": whole.stages[1:]})


@pytest.fixture(scope="module")
def rlhf(
    config: RunConfig, ray_session: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, dict[str, Any]]:
    run = open_run(config, tmp_path_factory.mktemp("runs"), named=True, resume=False)
    prepare(config, run.path)
    return run, run_recipe(config, run, read_inputs(config, run.path), lambda _: None)


def test_the_reward_model_learns_what_is_preferred(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    run, summary = rlhf
    assert summary["status"] == "succeeded"
    curve = [m for m in run.all_metrics() if m["stage"] == "reward_model"]
    assert len(curve) == 30
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    metrics = summary["stages"][1]["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["held_out/accuracy"] > 0.9, "chance is 0.5"
    assert min(metrics["margin"], metrics["held_out/margin"]) > 0


def test_it_leaves_a_model_folder_and_the_policy_as_it_was(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    from transformers import AutoModelForSequenceClassification

    run, _ = rlhf
    sft, made, ppo = finished(run)
    folder = run / "models" / "1-reward_model"
    assert made.reward_model == str(folder)
    assert made.digest == base_digest(folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    assert load_tokenizer(folder).eos_token == "<|im_end|>"

    assert (made.base, made.adapter) == (sft.base, sft.adapter)
    assert {row["digest"] for row in samples(run, 0)} == {sft.digest}
    assert ppo.base == sft.base


def samples(run: RunDir, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / f"samples/ppo/step-{step:06d}.parquet").to_pylist()


def test_its_rewards_are_those_of_the_saved_model(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    run, _ = rlhf
    folder = run / "models" / "1-reward_model"
    tokenizer, model = load_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = samples(run, 0) + samples(run, 1)
    assert len(rows) == 32
    for row in rows:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        with torch.no_grad():
            score = float(model(torch.tensor([[*prompt, *row["tokens"]]])).logits)
        assert row["reward/reward_model"] == pytest.approx(score, abs=1e-5)
        assert row["reward"] == row["reward/reward_model"], "the true reward beside it has no weight"
        assert row["reward/exact"] in (0.0, 1.0)
    assert len({row["reward/reward_model"] for row in rows}) > 16, "one number for all teaches nothing"


def test_a_critic_that_starts_from_it_expects_its_score_of_the_text_so_far(rlhf: tuple[RunDir, dict[str, Any]]) -> None:
    run, _ = rlhf
    folder = run / "models" / "1-reward_model"
    tokenizer, model = load_tokenizer(folder), RewardModel(folder)
    first = next(m for m in run.all_metrics() if m["stage"] == "ppo")
    seen = []
    for row in samples(run, 0):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        seen += [np.array([*prompt, *row["tokens"][:t]]) for t in range(len(row["tokens"]))]
    assert first["value/mean"] == pytest.approx(np.mean(model.scores(seen)), abs=1e-5)
    assert abs(first["value/mean"]) > 0.01


def test_the_held_out_measure_is_a_count_of_pairs(rlhf: tuple[RunDir, dict[str, Any]], config: RunConfig) -> None:
    run, summary = rlhf
    held_out = read_inputs(config, run.path).stages[1].held_out.proof.require()
    assert len(held_out) == 30
    model = RewardModel(run / "models" / "1-reward_model")
    rows = [[np.array(p.prompt_ids + ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in held_out]
    margins = [chosen - rejected for chosen, rejected in map(model.scores, rows)]
    metrics = summary["stages"][1]["metrics"]
    assert metrics["held_out/accuracy"] == sum(m > 0 for m in margins) / 30
    assert metrics["held_out/margin"] == pytest.approx(sum(margins) / 30, abs=1e-5)


def test_a_resume_from_the_last_good_checkpoint_makes_the_same_model(
    rlhf: tuple[RunDir, dict[str, Any]], config: RunConfig
) -> None:
    """The machine lost power before the stage was noted as done; the newest checkpoint was not whole on disk."""
    run, summary = rlhf
    done, stage = finished(run), config.stages[1]
    assert isinstance(stage, RewardModelStage)
    newest = run / "checkpoints/1-reward_model/step-000030/model.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    shutil.rmtree(run / "models/1-reward_model")
    given = read_inputs(config, run.path).stages[1]
    start = starting_model(stage, 1, ModelState(Path(done[0].base), Path(done[0].adapter or "")), run)
    with ThreadPoolExecutor(1) as thread:  # off the main thread, as the pipeline does
        again = thread.submit(
            run_offline_stage,
            stage,
            index=1,
            model=start,
            encoded=given.proof.require(),
            held_out=given.held_out.proof.require(),
            seed=config.seed,
            run_dir=run,
        ).result()
    assert [e["checkpoint"] for e in run.events("checkpoint_refused")] == ["step-000030"]
    assert again.reward_model == run / "models/1-reward_model"
    assert base_digest(again.reward_model) == done[1].digest
    assert again.metrics == summary["stages"][1]["metrics"]
