"""Steps that go on from a checkpoint, pack rows or compute activations anew give the weights of steps that do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from raylign.cluster.rundir import RunDir
from raylign.trainers.data.rows import kind_of_stage
from raylign.trainers.offline.collators import packed_rows
from raylign.trainers.offline.progress import Progress
from raylign.trainers.stages import OfflineStage, SftStage
from transformers import TrainerControl, TrainerState

from .test_parametrisations import METHODS, PARAMETRISATIONS, stage_of
from .worked import job, losses, rows, trainer_of

OTHER_METHODS = [(method, "lora") for method in METHODS if method != "sft"]
ONE_OF_A_KIND = [("sft", p) for p in PARAMETRISATIONS if p not in ("full", "qdora", "p_tuning, lstm")]


def trained(stage: OfflineStage, base: Path, scratch: Path, *, resume: Path | None = None, **options: Any) -> Any:
    trainer = trainer_of(job(stage, base, scratch, **options), rows(kind_of_stage(stage)), scratch)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def learned(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "parametrisation"), OTHER_METHODS + ONE_OF_A_KIND)
def test_a_resume_ends_in_the_same_weights(
    method: str, parametrisation: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Rows, schedule, moments, dropout's random numbers and AdaLoRA's budget go on where they were."""
    if parametrisation == "qlora":
        pytest.importorskip("bitsandbytes")
    stage = stage_of(method, parametrisation).model_copy(update={"checkpoint_every": 2})
    whole = trained(stage, tiny_model, tmp_path / "whole", teacher=other_model)
    again = trained(
        stage, tiny_model, tmp_path / "again", teacher=other_model, resume=tmp_path / "whole" / "checkpoint-2"
    )
    assert losses(again) == losses(whole)
    expected = learned(whole)
    assert expected
    assert all(torch.equal(weight, expected[name]) for name, weight in learned(again).items())


def test_adalora_ends_with_the_ranks_it_was_given(tiny_model: Path, tmp_path: Path) -> None:
    trainer = trained(stage_of("sft", "adalora"), tiny_model, tmp_path)
    pattern = trainer.model.peft_config["default"].rank_pattern
    assert len(pattern) == 14
    assert sum(sum(kept) for kept in pattern.values()) <= 14 * 2, "r is 2 on average, of 4 at the start"


def of(kind: str, **given: Any) -> OfflineStage:
    common = {"data": {"path": "x"}, "steps": 3, "batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-2}
    return TypeAdapter(OfflineStage).validate_python({"type": kind, **common, **given})


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cpt", {}),
        ("sft", {"adapter": {"r": 4}}),
        ("distill", {"teacher": {"path": "x"}}),
    ],
)
@pytest.mark.parametrize(
    "changed", [{"packing": True}, {"packing": True, "micro_batch_size": 2}, {"micro_batch_size": 1}]
)
def test_packing_and_micro_batches_change_nothing(
    kind: str, given: dict[str, Any], changed: dict[str, Any], tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Rows of unlike length side by side: had a token seen another row, the losses would part."""
    plain = trained(of(kind, **given), tiny_model, tmp_path / "plain", teacher=other_model)
    other = trained(of(kind, **given, **changed), tiny_model, tmp_path / "other", teacher=other_model)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


def test_packed_rows_begin_anew() -> None:
    packed = packed_rows([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert packed["labels"].tolist() == [[-100, 6, -100, 8, 9]]


def test_a_packed_row_does_not_see_the_one_before(tiny_model: Path) -> None:
    from raylign.trainers.adapters import open_base

    model = open_base(tiny_model).eval()
    row = {"input_ids": [5, 9, 40, 2], "labels": [5, 9, 40, 2]}
    with torch.no_grad():
        ends = []
        for first in ([1, 3, 4], [30, 31, 32]):
            packed = packed_rows([{"input_ids": first, "labels": first}, row])
            packed.pop("labels")
            ends.append(model(**packed, use_cache=False).logits[0, 3:])
        alone = model(torch.tensor([row["input_ids"]])).logits[0]
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert torch.allclose(ends[0], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "given"), [("cpt", {}), ("sft", {"adapter": {"r": 4}}), ("dpo", {"adapter": {"r": 4}})]
)
def test_activation_checkpointing_changes_no_loss(
    kind: str, given: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    plain = trained(of(kind, **given), tiny_model, tmp_path / "plain")
    saving = trained(of(kind, **given, activation_checkpointing=True), tiny_model, tmp_path / "saving")
    assert saving.model.is_gradient_checkpointing
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


def test_virtual_tokens_are_not_packed() -> None:
    with pytest.raises(ValidationError, match=r"packing with adapter\.type prefix: .* only the first row would see"):
        SftStage.model_validate({"data": {"path": "x"}, "packing": True, "adapter": {"type": "prefix"}})


def test_a_loss_that_is_no_number_names_its_rows_and_keeps_the_checkpoint_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = job(of("sft"), tiny_model, tmp_path)
    progress = Progress(made, RunDir(tmp_path), 0, tokens=[1] * 3, order=[*range(6), 9, 7, 9, 8, 2, 3, *range(6)])
    state, control = TrainerState(global_step=2), TrainerControl()
    progress.on_log(None, state, control, logs={"loss": float("nan"), "grad_norm": 1.0})
    assert "step 2 gave a loss of nan and a gradient of 1.0 on data rows 3, 4, 8, 9, 10:" in str(progress.error)
    assert (control.should_training_stop, control.should_save) == (True, False)
    assert RunDir(tmp_path).all_metrics() == []
