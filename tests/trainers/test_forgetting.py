"""Forgetting, KL to the base and red flags of a folder."""

from pathlib import Path

import pytest
import torch
from raylign.cluster.errors import InputError
from raylign.trainers.adapters import open_base
from raylign.trainers.forgetting import GENERAL_TEXT, evaluate_folder, flags

from .test_adapters import moved, save


def test_a_base_has_no_forgetting_and_transformers_own_loss(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    found = evaluate_folder(tiny_model, None, [GENERAL_TEXT[0]])
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_model)(GENERAL_TEXT[0])["input_ids"]])
    with torch.no_grad():
        wanted = open_base(tiny_model)(ids, labels=ids).loss.item()  # type: ignore[operator]
    assert found["held_out"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["forgetting"] is None


def test_an_adapter_that_does_harm_is_an_alarm(tiny_model: Path, tmp_path: Path) -> None:
    _, folder = save(moved(tiny_model), tiny_model, tmp_path)
    found = evaluate_folder(tiny_model, folder, alarm=-100)
    general = found["general"]
    assert found["forgetting"] == pytest.approx(general["loss"] - general["base_loss"])
    assert general["kl_to_base"] > 0.001
    assert "forgetting" in found["flags"]
    assert "forgetting" not in evaluate_folder(tiny_model, folder, alarm=100)["flags"]
    with pytest.raises(InputError, match="no adapter folder"):
        evaluate_folder(tiny_model, tiny_model)


def test_flags_by_hand() -> None:
    fine = {"forgetting": None, "repetition": 0.0, "held_out": {"loss": 1.0, "base_loss": 2.0}}
    assert flags(fine, 0.1) == []
    bad = {"forgetting": 0.2, "repetition": 0.9, "held_out": {"loss": 3.0, "base_loss": 2.0}}
    assert flags(bad, 0.1) == ["forgetting", "diverging", "repetition"]
    assert flags(fine | {"held_out": {"loss": 0.001}}, 0.1) == ["loss_at_zero"]
