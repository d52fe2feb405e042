"""A reward model as a reward: which rows share a forward, what a score depends on, and which folders are refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.rollout.config import FormatReward, ModelReward
from raylign.rollout.records import Group, Sample
from raylign.rollout.rewards.model import RewardModel, batches
from raylign.rollout.rewards.model_folder import check_reward_model, check_same_body
from raylign.rollout.rewards.scorer import Scorer
from raylign.trainers.adapters import open_reward_model, save_reward_model
from raylign.trainers.data.template import load_tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "model"
    return save_reward_model(open_reward_model(tiny_model, None, seed=1), tiny_model, out)


def rows(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 250, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([], 100, []),
        ([8, 8, 8], 100, [[0, 1, 2]]),
        ([80, 100, 70, 90, 69], 1000, [[1, 3], [0, 2], [4]]),  # 88 is seven eighths of 100, 70 of 80
        ([10, 10, 10, 10], 20, [[0, 1], [2, 3]]),
        ([50, 5], 20, [[0], [1]]),  # a row longer than the limit still has a forward
    ],
)
def test_rows_of_like_length_share_a_forward(lengths: list[int], max_tokens: int, expected: list[list[int]]) -> None:
    assert batches(lengths, max_tokens) == expected


def test_padding_is_never_more_than_an_eighth() -> None:
    lengths = np.random.default_rng(1).integers(1, 2000, 500).tolist()
    made = batches(lengths)
    assert sorted(i for batch in made for i in batch) == list(range(500))
    for batch in made:
        real = sum(lengths[i] for i in batch)
        assert real >= 7 / 8 * len(batch) * max(lengths[i] for i in batch)


def test_a_score_is_the_saved_models_and_company_changes_rounding_alone(folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = RewardModel(folder)
    given = rows(40, 39, 38, 40, 12, 11, 12, 90)
    direct = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [float(direct(torch.from_numpy(row.astype(np.int64))[None]).logits) for row in given]
    together = model.scores(given)
    assert together == pytest.approx(expected, abs=1e-5)
    assert max(together) - min(together) > 0.1
    assert model.scores(given) == together, "the same group gives the same bits"
    assert [model.scores([row])[0] for row in given] == pytest.approx(together, abs=1e-5)
    assert model.scores(given[::-1])[::-1] == pytest.approx(together, abs=1e-5)


def test_a_score_leaves_the_number_of_threads_as_it_was(folder: Path) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        RewardModel(folder).scores(rows(5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def group(*completions: np.ndarray) -> Group:
    samples = tuple(
        Sample(tokens=tokens, logprobs=np.zeros(len(tokens), np.float32), finish_reason="stop", text=str(len(tokens)))
        for tokens in completions
    )
    return Group(step=3, index=5, prompt=np.array([5, 6, 7], np.int32), row={}, samples=samples)


def test_the_scorer_weighs_it_beside_other_rewards(folder: Path) -> None:
    rewards = [ModelReward(path=str(folder), name="taste", weight=2.0), FormatReward(pattern="4")]
    scorer = Scorer(rewards, Path("/"))
    given = group(*rows(4, 9))
    try:
        scored = scorer.score(given)
    finally:
        scorer.close()
    expected = RewardModel(folder).scores([np.concatenate([given.prompt, s.tokens]) for s in given.samples])
    assert [s.reward_parts for s in scored.samples] == [
        {"taste": expected[0], "format": 1.0},
        {"taste": expected[1], "format": 0.0},
    ]
    assert [s.reward for s in scored.samples] == [2 * expected[0] + 1, 2 * expected[1]]
    assert list(scorer.counters()) == ["seconds", "seconds/format", "seconds/taste"]  # and no errors


def test_a_score_that_is_no_number_is_an_error_with_its_place(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    change(broken, "score.weight", lambda weight: weight * np.nan)
    scorer = Scorer([ModelReward(path=str(broken))], Path("/"))
    with pytest.raises(RunFailed, match=r"reward 'model' gave nan, which is not finite, at step 3, group 5, compl"):
        scorer.score(group(*rows(4, 9)))
    dropping = Scorer([ModelReward(path=str(broken))], Path("/"), "drop")
    assert "gave nan" in (dropping.score(group(*rows(4, 9))).error or "")
    assert dropping.counters()["errors/model"] == 1


def change(folder: Path, name: str, how: Any) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    value = how(tensors.pop(name))
    save_file(tensors if value is None else tensors | {name: value}, path, {"format": "pt"})


def test_a_folder_without_its_head_is_refused_and_not_filled_at_random(folder: Path, tmp_path: Path) -> None:
    headless = shutil.copytree(folder, tmp_path / "headless")
    change(headless, "score.weight", lambda _: None)
    with pytest.raises(InputError, match=r"headless is not a reward model: it has no weights score\.weight"):
        Scorer([ModelReward(path=str(headless))], Path("/"))


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_a_reward_model_of_the_policys_kind_is_taken(folder: Path, tiny_model: Path) -> None:
    check_reward_model(folder, tiny_model, load_tokenizer(tiny_model), "stages.0.rewards.0.path")


def refused(folder: Path, policy: Path) -> str:
    with pytest.raises(InputError, match=r"^stages\.0\.rewards\.0\.path: ") as caught:
        check_reward_model(folder, policy, load_tokenizer(policy), "stages.0.rewards.0.path")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_reward_model_is_refused(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert "no model folder at" in refused(tmp_path / "none", tiny_model)
    assert "is LlamaForCausalLM, not a model for sequence classification" in refused(tiny_model, tiny_model)
    (tmp_path / "empty").mkdir()
    assert "config.json cannot be read" in refused(tmp_path / "empty", tiny_model)
    two = edited(folder, tmp_path / "two", id2label={"0": "no", "1": "yes"})
    assert "has 2 labels, and a reward is one number" in refused(two, tiny_model)
    assert "has no pad_token_id" in refused(edited(folder, tmp_path / "pad", pad_token_id=None), tiny_model)
    bare = edited(folder, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    assert r"has no *.safetensors" in refused(bare, tiny_model)


def test_a_critic_takes_a_reward_model_of_the_policys_size(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    check_same_body(folder, tiny_model, "stages.0.critic.path")
    larger = edited(folder, tmp_path / "larger", num_hidden_layers=3)
    with pytest.raises(
        InputError, match=r"^stages\.0\.critic\.path: .*larger has num_hidden_layers 3 and the policy 2"
    ):
        check_same_body(larger, tiny_model, "stages.0.critic.path")


def test_another_tokenizer_or_chat_form_is_refused(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert re.search(
        r"knows 100 tokens and the policy has \d+",
        refused(edited(folder, tmp_path / "small", vocab_size=100), tiny_model),
    )
    swapped = edited(folder, tmp_path / "swapped")
    text = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(text))
    message = refused(swapped, tiny_model)
    assert re.search(r"another tokenizer than the policy: token 'a' is (\d+) there and (\d+) in it: take a", message)
    form = edited(folder, tmp_path / "form")
    template = form / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|><|im_end|>"))
    assert "another chat form than the policy's" in refused(form, tiny_model)
