"""TRL's RewardTrainer as a training worker makes it, in this process: its loss, its adapter, its resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.rollout.rewards.model import RewardModel
from raylign.trainers.adapters import open_base, open_reward_model, save_reward_model
from raylign.trainers.offline.stage import TrainJob
from raylign.trainers.stages import DataConfig, LoraConfig, RewardModelStage

STEPS = 4


def pairs() -> list[dict[str, list[int]]]:
    """Answers of one to five tokens; those wanted are of the token 10, the others of 20."""
    return [
        {"prompt_ids": [1, 50 + n, 2], "chosen_ids": [10] * (1 + n % 5) + [2], "rejected_ids": [20] * (1 + n % 3) + [2]}
        for n in range(8 * STEPS)
    ]


def job(base: Path, root: Path, **stage: Any) -> TrainJob:
    made = RewardModelStage(data=DataConfig(path="x"), steps=STEPS, batch_size=8, micro_batch_size=2, **stage)
    return TrainJob(
        stage=made,
        name="taste",
        base=base,
        adapter=None,
        init_random=False,
        seed=5,
        steps=STEPS,
        run_dir=root,
        checkpoints=root / "checkpoints",
        model_out=root / "model",
    )


def train(job: TrainJob, scratch: Path, resume: Path | None = None) -> Any:
    """The trainer after its last step."""
    from datasets import Dataset
    from raylign.trainers.offline.hf_trainer import make_trainer

    model = open_reward_model(job.base, job.stage.adapter, seed=job.seed)
    trainer = make_trainer(job, model, Dataset.from_list(pairs()), scratch)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_the_loss_is_that_of_the_pairs_whatever_the_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    made = job(tiny_model, tmp_path, learning_rate=1e-3)
    first = train(made, tmp_path / "scratch").state.log_history[0]
    untrained = save_reward_model(open_reward_model(tiny_model, None, seed=5), tiny_model, tmp_path / "untrained")
    rows = [[np.array(p["prompt_ids"] + p[side]) for side in ("chosen_ids", "rejected_ids")] for p in pairs()[:8]]
    margins = np.array([chosen - rejected for chosen, rejected in map(RewardModel(untrained).scores, rows)])
    assert first["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert first["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert first["accuracy"] == (margins > 0).mean()


def test_an_adapter_trains_with_the_head_and_is_merged(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    made = job(tiny_model, tmp_path, adapter=LoraConfig(r=4), learning_rate=1e-2)
    trainer = train(made, tmp_path / "scratch")
    trained, row = trainer.model.eval(), pairs()[3]["prompt_ids"] + pairs()[3]["chosen_ids"]
    with torch.no_grad():
        expected = float(trained(torch.tensor([row])).logits)
    moving = {name.split(".")[-3] for name, p in trained.named_parameters() if p.requires_grad}
    assert moving == {"lora_A", "lora_B", "modules_to_save"}

    folder = save_reward_model(trained, tiny_model, made.model_out)
    assert RewardModel(folder).scores([np.array(row)]) == pytest.approx([expected], abs=1e-5)
    before = open_reward_model(tiny_model, None, seed=5).state_dict()
    after = open_saved(folder)
    assert not torch.equal(after["score.weight"], before["score.weight"])
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(
        after["model.embed_tokens.weight"], open_base(tiny_model).state_dict()["model.embed_tokens.weight"]
    )


def open_saved(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_resumed_adapter_ends_in_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    made = job(tiny_model, tmp_path, adapter=LoraConfig(r=4), learning_rate=1e-2)
    whole = train(made, tmp_path / "scratch").model.state_dict()
    again = train(made, tmp_path / "resumed", resume=tmp_path / "scratch" / "checkpoint-2").model.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
