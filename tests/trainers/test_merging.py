"""Merging: what comes out is what the numbers say; what does not belong together is refused, and nothing written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.cluster.errors import InputError
from raylign.cluster.weights import load_adapter
from raylign.trainers.adapters import open_base, open_model
from raylign.trainers.merging import combine_adapters, merge_into_base, slerp, slerp_models
from raylign.trainers.stages import LoraConfig

from .test_adapters import logits, moved, save


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save(moved(tiny_model, seed), tiny_model, root)[1] for seed in (3, 4)]


def change(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    merged = open_model(base, folder, None, seed=0).merge_and_unload()  # type: ignore[operator]
    plain = dict(open_base(base).named_parameters())
    return {n: (p - plain[n]).detach() for n, p in merged.named_parameters() if "proj" in n}


def test_a_merged_folder_gives_the_adapters_logits(tiny_model: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merge_into_base(tiny_model, adapters[0], tmp_path / "merged")
    wanted = logits(open_model(tiny_model, adapters[0], None, seed=0))
    assert np.abs(logits(open_base(out)) - wanted).max() < 1e-4
    with pytest.raises(InputError, match="is there already"):
        merge_into_base(tiny_model, adapters[0], out)


def test_on_a_quantised_base_the_merge_adds_to_its_values(
    tiny_model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    out = merge_into_base(tiny_model, adapters[0], tmp_path / "merged", quantized=True)
    trained_on = open_model(tiny_model, adapters[0], LoraConfig(r=4, quantize="nf4"), seed=0)
    assert np.abs(logits(open_base(out)) - logits(trained_on)).max() < 1e-3
    plain = open_model(tiny_model, adapters[0], None, seed=0)
    assert np.abs(logits(open_base(out)) - logits(plain)).max() > 0.01


def test_svd_of_the_full_rank_is_the_weighted_sum(tiny_model: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = combine_adapters(tiny_model, adapters, tmp_path / "sum", how="svd", weights=[0.25, 0.75], rank=8)
    parts = [change(tiny_model, folder) for folder in adapters]
    for name, got in change(tiny_model, out).items():
        wanted = 0.25 * parts[0][name] + 0.75 * parts[1][name]
        assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd"])
def test_every_combination_makes_an_adapter_that_loads(
    tiny_model: Path, adapters: list[Path], tmp_path: Path, how: str
) -> None:
    out = combine_adapters(tiny_model, adapters, tmp_path / how, how=how)
    tensors, _ = load_adapter(out)
    assert all(np.isfinite(array).all() for array in tensors.values())
    assert any(np.abs(array).max() > 0 for name, array in tensors.items() if "lora_B" in name)
    assert np.isfinite(logits(open_model(tiny_model, out, None, seed=0))).all()


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = 2**-0.5  # sin 45° / sin 90°
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([half, 2 * half]))
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)  # no angle: linear
    assert torch.equal(slerp(a, torch.zeros(2), 0.5), a / 2)


def test_slerp_of_models_ends_at_both(tiny_model: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = merge_into_base(tiny_model, adapters[0], tmp_path / "other")
    for t, model in ((0.0, tiny_model), (1.0, other)):
        out = slerp_models(tiny_model, other, tmp_path / f"at-{t}", t=t)
        assert np.abs(logits(open_base(out)) - logits(open_base(model))).max() < 1e-4


def test_what_does_not_belong_together_is_refused(tiny_model: Path, adapters: list[Path], tmp_path: Path) -> None:
    from benchmarks.models import save_model

    def refused(match: str, work: Any) -> None:
        with pytest.raises(InputError, match=match):
            work()
        assert not list(tmp_path.glob("out*"))
        assert not list(tmp_path.glob(".draft*"))

    out = tmp_path / "out"
    wide = save(open_model(tiny_model, None, LoraConfig(r=8), seed=1), tiny_model, tmp_path / "wide")[1]
    refused("adds factors of one rank", lambda: combine_adapters(tiny_model, [adapters[0], wide], out))
    other = save_model("1M", "fp32", tmp_path / "1M")
    refused("trained on another base", lambda: merge_into_base(other, adapters[0], out))
    refused("are of different architectures", lambda: slerp_models(tiny_model, other, out))
    refused("is no combination", lambda: combine_adapters(tiny_model, adapters, out, how="blend"))
    refused("2 adapters: give one each", lambda: combine_adapters(tiny_model, adapters, out, weights=[1.0]))
    refused("two adapters or more", lambda: combine_adapters(tiny_model, adapters[:1], out))
    refused("no adapter folder", lambda: merge_into_base(tiny_model, tiny_model, out))
