"""Export: the gate lets through what is the same, and refuses with its numbers, writing nothing."""

from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.trainers.adapters import open_base, open_model
from raylign.trainers.export import Limits, compare, export

from .test_adapters import logits, moved, save


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(moved(tiny_model), tiny_model, tmp_path_factory.mktemp("adapters"))[1]


def test_what_is_exported_is_what_was_trained(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    found = export(tiny_model, adapter, tmp_path / "out", to="safetensors")
    assert [c["form"] for c in found] == ["merged", "served"]
    assert [c["agreement"] for c in found] == [1.0, 1.0]
    assert abs(found[0]["kl"]) < 1e-5
    wanted = logits(open_model(tiny_model, adapter, None, seed=0))
    assert np.abs(logits(open_base(tmp_path / "out")) - wanted).max() < 1e-4


def test_four_bits_too_far_away_are_refused_with_their_numbers(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(RunFailed, match=r"bnb-4bit is outside the limits .*: merged KL .*; bnb-4bit KL 0\.\d+"):
        export(tiny_model, adapter, tmp_path / "out", to="bnb-4bit", limits=Limits(kl=1e-4))
    assert list(tmp_path.iterdir()) == []
    found = export(tiny_model, adapter, tmp_path / "out", to="bnb-4bit", limits=Limits(kl=10, agreement=0))
    assert found[-1]["kl"] > 1e-4
    assert "quantization_config" in (tmp_path / "out" / "config.json").read_text()


def test_without_its_tool_a_format_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for given, said in ((None, "no path was given"), (tmp_path, "has no convert_hf_to_gguf.py")):
        with pytest.raises(InputError, match=f"gguf needs llama.cpp's own converter: .*{said}"):
            export(tiny_model, None, tmp_path / "out", to="gguf", llama_cpp=given)
    with pytest.raises(InputError, match="format 'onnx' is none of safetensors"):
        export(tiny_model, None, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_kl_and_agreement_by_hand() -> None:
    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    found = compare("x", [p], [q])
    assert found.kl == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2)
    assert found.agreement == 0.5
