"""Episodes of several turns in a run: what is learned, and that nobody's arrival changes it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from raylign.cluster.rundir import RunDir
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.prefixes import Packing
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.scoring_model import logprobs_of
from raylign.trainers.stages import OnlineStage
from transformers import AutoModelForCausalLM

from .conftest import Train

ASK = """
class Ask:
    def step(self, messages, row):
        said = messages[-1]["content"]
        if len(messages) == 6:
            raise ValueError("six messages")
        number = len(messages) // 2
        return {"role": "user", "content": f"{number} {row['prompt'][0]['content']}"}, number / 4, "e" in said
"""


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose messages end with any of sixty tokens: of a random model's, every fourth."""
    folder = tmp_path_factory.mktemp("models") / "brief"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(100, 160)]}))
    return folder


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ask.py").write_text(ASK)
    return {
        "rollout__environment": f"{{type: python, path: '{tmp_path}/ask.py:Ask', turns: 4, timeout_seconds: 5}}",
        "rollout__sampling__max_tokens": 150,
        "scoring__on_error": "zero",
        "steps": 2,
        "checkpoint_every": 1,
        "kl": "{coefficient: 0.01}",
        "reference": "adapter_off",
    }


def samples(run: RunDir) -> list[dict[str, Any]]:
    return [row for path in sorted((run / "samples/grpo").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_what_the_policy_wrote_is_learned_for_any_workers_and_after_a_stop(
    train_here: Train, fields: dict[str, Any], tiny_model: Path
) -> None:
    alone = train_here("alone", "grpo", **fields)
    rows, metrics = samples(alone), alone.all_metrics()
    turns = {row["turns"] for row in rows}
    assert {1, 2, 3} <= turns <= {1, 2, 3, 4}
    assert metrics[0]["turns/mean"] == pytest.approx(np.mean([row["turns"] for row in rows[:32]]))
    assert all(m["mismatch/max"] < 1e-3 for m in metrics)  # the trainer's log-probs of the same tokens, and no others
    assert metrics[1]["kl"] != 0

    stops = [2, *range(100, 160)]
    for row in rows:
        drawn = [i for i, logprob in enumerate(row["logprobs"]) if logprob != 0]
        assert len(drawn) == sum(span["tokens"] for span in row["spans"])
        asked = row["transcript"].count("<|im_start|>user\n")
        assert asked == row["turns"] - 1
        if row["finish_reason"] == "stop":
            assert row["tokens"][-1] in stops
    once = next(row for row in rows if row["turns"] == 2)
    assert f"\n<|im_start|>user\n1 {once['prompt']}<|im_end|>\n<|im_start|>assistant\n" in once["transcript"]
    ended = [row for row in rows if row["turns"] < 3 and row["finish_reason"] == "stop"]
    assert {row["reward/environment"] for row in ended} <= {0.25, 0.75}
    assert all(row["reward"] == row["reward/vowels"] + row["reward/environment"] for row in rows)
    assert sum(m.get("scoring/errors/environment", 0) for m in metrics[-1:]) == sum(row["turns"] == 3 for row in rows)

    stopped = train_here("again", "grpo", lambda run, done: run.desire(stop=done == 1), workers=2, **fields)
    stopped.desire(stop=False)
    again = train_here("again", "grpo", **fields)
    assert again.events("weights")[-1]["digest"] == alone.events("weights")[-1]["digest"]
    assert [row["tokens"] for row in samples(again)] == [row["tokens"] for row in rows]


def test_log_probs_stand_where_the_policy_wrote_and_are_those_of_the_whole_episode(tiny_model: Path) -> None:
    """Against a plain forward of all tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompt, tokens = np.array([5, 6, 7], np.int32), np.array([9, 2, 30, 31, 11, 12, 2], np.int32)
    written = np.array([1, 1, 0, 0, 1, 1, 1], bool)
    none = np.zeros(7, np.float32)
    sample = TrainSample(prompt=prompt, tokens=tokens, behaviour=none, advantages=none, written=written)
    other = TrainSample(prompt=prompt, tokens=tokens[:2], behaviour=none[:2], advantages=none[:2])
    assert (sample.count, other.count) == (5, 2)
    for packing in (Packing(1000), Packing(1000, 0.001)):
        found, two = logprobs_of(model, [sample, other], 1.0, packing, Ranks("cpu"))
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.tolist(), *tokens.tolist()]])).logits[0, 2:-1]
        plain = logits.log_softmax(-1).gather(1, torch.tensor(tokens.astype(np.int64))[:, None])[:, 0].numpy()
        np.testing.assert_allclose(found, plain * written, atol=1e-5)
        np.testing.assert_allclose(two, plain[:2], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"partial_tokens": 8}, "partial_tokens with a rollout.environment: an episode is cut at no token"),
        ({"type": "ppo"}, "critic with a rollout.environment"),
        ({"type": "spin"}, "demonstrations with a rollout.environment"),
        ({"type": "reinforce_pp"}, "advantage returns with a rollout.environment"),
        ({"rewards": [{"type": "format", "pattern": "x", "name": "environment"}]}, "a reward is called 'environment'"),
        ({"rollout": {}}, "rewards: there are none"),
    ],
)
def test_what_an_episode_cannot_be_is_refused(more: dict[str, Any], reason: str) -> None:
    rollout = {"environment": {"type": "tools", "functions": ["f.py:f"]}}
    with pytest.raises(ValidationError, match=reason):
        OnlineStage.model_validate({"data": {"path": "p"}, "rollout": rollout, **more})
    assert OnlineStage.model_validate({"data": {"path": "p"}, "rollout": rollout}).rewards == []
