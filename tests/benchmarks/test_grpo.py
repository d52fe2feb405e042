"""The benchmark of the whole loop: our side is the quickstart's stage, with what TRL does and nothing else."""

from pathlib import Path

import yaml
from raylign.trainers.recipe import load_recipe
from raylign.trainers.schedule import learning_rate
from raylign.trainers.stages import OnlineStage

from benchmarks import grpo


def test_our_side_does_what_the_plan_says(tmp_path: Path) -> None:
    plan = grpo.Plan(steps=7, batch=32, group=4, max_tokens=9, learning_rate=3e-4, warmup_steps=2)
    start = grpo.Start(base=tmp_path / "base", adapter=tmp_path / "adapter", prompts=tmp_path / "prompts.jsonl")
    path = tmp_path / "grpo.yaml"
    path.write_text(yaml.safe_dump(grpo.recipe_of(plan, start, 3)))
    config = load_recipe(path)
    (stage,) = config.stages
    assert isinstance(stage, OnlineStage)
    assert config.seed == 3
    assert (stage.steps, stage.batch_size, stage.prompts_per_step, stage.updates_per_step) == (7, 32, 8, 1)
    assert (stage.rollout.group_size, stage.rollout.sampling.max_tokens) == (4, 9)
    assert (stage.learning_rate, stage.warmup_steps, stage.schedule, stage.betas) == (3e-4, 2, "linear", (0.9, 0.95))
    assert (stage.kl, stage.mismatch, stage.clip.dual, stage.clip.high) == (None, None, None, 0.28)
    assert (stage.advantage, stage.advantage_scale, stage.aggregation) == ("group_mean", "batch", "token")
    assert grpo.rates(plan) == [learning_rate(stage, step, 7) for step in range(7)]
    assert stage.adapter is not None
    assert stage.adapter.path == str(start.adapter)
    assert [reward.type for reward in stage.rewards] == ["function", "format"]
