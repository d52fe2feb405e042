"""The losses of the offline methods against values worked by hand, each through the trainer that a worker makes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from raylign.cluster.errors import InputError
from raylign.trainers.adapters import open_base, open_reward_model
from raylign.trainers.config import RunConfig
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.data.proof import prove_stage
from raylign.trainers.data.rows import load_rows
from raylign.trainers.data.template import Encoded, EncodedPair, load_tokenizer
from raylign.trainers.offline.stage import OfflineStage, row_order
from raylign.trainers.stages import (
    DataConfig,
    DistillStage,
    DpoStage,
    KtoStage,
    OrpoStage,
    ProcessRewardModelStage,
    SimpoStage,
    TeacherConfig,
)

from .worked import job, losses, question, rows, said, trainer_of

SHORT = {"data": DataConfig(path="x"), "steps": 1, "batch_size": 4, "learning_rate": 1e-3}


def first_loss(stage: OfflineStage, kind: str, base: Path, root: Path, **options: Any) -> float:
    made = trainer_of(job(stage, base, root, **options), rows(kind), root / "scratch")
    made.train()
    return losses(made)[0]


def pairs_of_step(stage: OfflineStage, base: Path) -> list[EncodedPair]:
    encoded = prove_stage(stage, rows("preference"), load_tokenizer(base)).require()
    return [encoded[i] for i in row_order(5, len(encoded), stage.batch_size, 1)]  # type: ignore[misc]


def means(base: Path, pairs: list[EncodedPair]) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean log-prob of a token of the chosen and rejected answers, and the loss of fine-tuning on whole chosen rows."""
    model, found, nll = open_base(base), [], []
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + answer])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
            tokens = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
            found.append(tokens[-len(answer) :].mean())
            nll += [-tokens] if answer is pair.chosen_ids else []
    return np.array(found[::2]), np.array(found[1::2]), float(np.concatenate(nll).mean())


LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOG2),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "ipo", "beta": 0.1}, 25.0),  # (0 − 1 / 2β)²
        ({"loss": "robust", "label_smoothing": 0.1}, LOG2),  # ((1 − ε) log 2 − ε log 2) / (1 − 2ε)
        ({"loss": "exo_pair", "label_smoothing": 0.1}, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
        ({"loss": "apo_zero"}, 1.0),
        ({"loss": "sppo_hard", "beta": 0.1}, 50.0),  # (0 − 1 / 2β)² twice
        ({"loss": "nca_pair"}, 2 * LOG2),
        ({"loss": "aot"}, LOG2),
    ],
)
def test_a_loss_of_pairs_starts_where_policy_and_reference_agree(
    options: dict[str, Any], expected: float, tiny_model: Path, tmp_path: Path
) -> None:
    stage = DpoStage(**SHORT | options)
    assert first_loss(stage, "preference", tiny_model, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_kto_starts_at_half_the_weight_of_each_label(tiny_model: Path, tmp_path: Path) -> None:
    stage = KtoStage(**SHORT | {"batch_size": 32}, undesirable_weight=3.0)  # every row once: 16 of each label
    assert first_loss(stage, "unpaired", tiny_model, tmp_path) == pytest.approx((0.5 + 1.5) / 2, abs=1e-5)


def test_simpo_is_a_margin_of_mean_logprobs(tiny_model: Path, tmp_path: Path) -> None:
    stage = SimpoStage(**SHORT, beta=2.0, gamma=1.0)
    chosen, rejected, _ = means(tiny_model, pairs_of_step(stage, tiny_model))
    expected = np.log1p(np.exp(-(2.0 * (chosen - rejected) - 1.0))).mean()
    assert first_loss(stage, "preference", tiny_model, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_orpo_is_fine_tuning_with_odds(tiny_model: Path, tmp_path: Path) -> None:
    stage = OrpoStage(**SHORT, beta=0.5)
    chosen, rejected, nll = means(tiny_model, pairs_of_step(stage, tiny_model))
    odds = (chosen - rejected) - (np.log1p(-np.exp(chosen)) - np.log1p(-np.exp(rejected)))
    expected = nll + 0.5 * np.log1p(np.exp(-odds)).mean()
    assert first_loss(stage, "preference", tiny_model, tmp_path) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("beta", "micro"), [(0.0, 4), (0.0, 1), (1.0, 4)])
def test_distillation_is_the_kl_of_supervised_tokens(
    beta: float, micro: int, other_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage = DistillStage(**SHORT, micro_batch_size=micro, teacher=TeacherConfig(path=str(other_model)), beta=beta)
    encoded = prove_stage(stage, rows("messages"), load_tokenizer(tiny_model)).require()
    student, teaches, found = open_base(tiny_model), open_base(other_model), []
    for i in row_order(5, len(encoded), 4, 1):
        ids, labels = torch.tensor([encoded[i].input_ids]), torch.tensor(encoded[i].labels)  # type: ignore[union-attr]
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids).logits[0, :-1][labels[1:] != -100], -1) for m in (teaches, student))
        first, second = (p, q) if beta == 0 else (q, p)
        found.append((first.exp() * (first - second)).sum(-1))
    expected = float(torch.cat(found).mean())
    assert first_loss(stage, "messages", tiny_model, tmp_path, teacher=other_model) == pytest.approx(expected, abs=1e-5)


def test_a_teacher_of_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows("messages")[0]) + "\n")
    shutil.copytree(tiny_model, tmp_path / "teacher")
    tokens = tmp_path / "teacher/tokenizer.json"
    tokens.write_text(tokens.read_text().replace("<|im_end|>", "<|end|>"))
    stage = {"type": "distill", "data": {"path": str(tmp_path / "rows.jsonl")}}

    def read(teacher: Path) -> None:
        stages = [stage | {"teacher": {"path": str(teacher)}}]
        config = RunConfig.model_validate({"name": "x", "model": {"path": str(tiny_model)}, "stages": stages})
        read_inputs(config, tmp_path)

    read(tiny_model)
    with pytest.raises(InputError, match=r"stages\.0\.teacher\.path: .* has another tokenizer than the student"):
        read(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"no model folder at .*teachr: did you mean teacher\?"):
        read(tmp_path / "teachr")


def test_a_step_with_a_control_token_is_refused(tiny_model: Path) -> None:
    stage = ProcessRewardModelStage(**SHORT)
    row = rows("stepwise", 1)[0] | {"completions": ["a <|im_end|>", "b"]}
    with pytest.raises(InputError, match=r"contains the control token '<\|im_end\|>'"):
        prove_stage(stage, [row], load_tokenizer(tiny_model)).require()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": question(1) + said("2"), "label": 1}, r"row 1: label is 1: it must be true \(wanted\) or false"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True]}, "2 steps and 1 labels: every step needs one"),
        ({"prompt": "a", "completions": ["b", " "], "labels": [True, True]}, "a step each, none of them empty"),
        ({"prompt": "a", "completions": ["b"], "labels": ["+"]}, "labels must be a list of true and false"),
    ],
)
def test_rows_without_a_usable_label_are_refused(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    kind = "unpaired" if "label" in row else "stepwise"
    with pytest.raises(InputError, match=says):
        load_rows(DataConfig(path="rows.jsonl"), tmp_path / "rows.jsonl", kind)


def test_a_process_reward_model_is_trained_at_the_ends_of_steps(tiny_model: Path, tmp_path: Path) -> None:
    stage = ProcessRewardModelStage(**SHORT | {"steps": 30, "learning_rate": 1e-2})
    tokenizer = load_tokenizer(tiny_model)
    encoded = prove_stage(stage, rows("stepwise"), tokenizer).require()
    first, model = encoded[0], open_reward_model(tiny_model, None, seed=5, task="TOKEN_CLS")
    assert isinstance(first, Encoded)
    assert [label for label in first.labels if label >= 0] == [1, 0]
    assert all(tokenizer.decode([first.input_ids[end - 1]]) == "\n" for _, end in first.spans)
    expected = []
    for i in row_order(5, len(encoded), 4, 1):
        with torch.no_grad():
            logits = model(torch.tensor([encoded[i].input_ids])).logits[0]  # type: ignore[union-attr]
        right, wrong = (end - 1 for _, end in encoded[i].spans)  # type: ignore[union-attr]
        expected += [-torch.log_softmax(logits[right], -1)[1], -torch.log_softmax(logits[wrong], -1)[0]]

    made = trainer_of(job(stage, tiny_model, tmp_path), rows("stepwise"), tmp_path / "scratch")
    made.train()
    curve = losses(made)
    assert curve[0] == pytest.approx(np.mean(expected), abs=1e-4)
    assert curve[-1] < 0.1 * curve[0]


@pytest.mark.parametrize(
    ("stage", "given", "says"),
    [
        (KtoStage, {"micro_batch_size": 1}, r"micro_batch_size 1: kto compares the rows .* take 2 or more"),
        (DpoStage, {"loss": "robust"}, "loss robust needs label_smoothing above 0"),
        (DpoStage, {"label_smoothing": 0.1}, "label_smoothing with loss sigmoid does nothing: take loss: robust"),
        (DpoStage, {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1 has no place in loss ipo"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(stage: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        stage(data=DataConfig(path="x"), **given)
