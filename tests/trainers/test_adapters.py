"""Adapters: seeded, exported, read back to the same logits, merged, and refused on another base."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError
from raylign.cluster.weights import adapter_digest, base_digest, save_adapter
from raylign.trainers.adapters import (
    Exporter,
    arrays,
    check_adapter,
    export_weights,
    merge_adapter,
    open_base,
    open_model,
)
from raylign.trainers.stages import LoraConfig

LORA = LoraConfig(r=4)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 9, 40, 2]])).logits.numpy()


def moved(base: Path, seed: int = 3) -> Any:
    """A model whose adapter does something: B starts at zero."""
    import torch

    model = open_model(base, None, LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def save(model: Any, base: Path, root: Path) -> tuple[str, Path]:
    tensors, config = export_weights(model)
    return save_adapter(root, tensors, config, {"base_digest": base_digest(base)})


def test_a_new_adapter_is_seeded_and_changes_nothing_yet(tiny_model: Path) -> None:
    one, same, other = (export_weights(open_model(tiny_model, None, LORA, seed=s))[0] for s in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)
    fresh = open_model(tiny_model, None, LORA, seed=1)
    assert np.array_equal(logits(fresh), logits(open_base(tiny_model)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exporter_follows_the_weights_without_copies(tiny_model: Path, dtype: str) -> None:
    import torch
    from peft import get_peft_model_state_dict

    model = open_model(tiny_model, None, LORA, seed=1, dtype=dtype)
    exporter, parameters = Exporter(model), dict(model.named_parameters())
    exported = arrays(exporter.named(parameters))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    wanted = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(model).items()}
    assert list(exported) == list(wanted)
    for name, array in arrays(exporter.named(parameters)).items():
        assert array.dtype == np.float32  # of the adapter, whatever the base's is
        assert np.array_equal(array, wanted[name])
        assert np.shares_memory(array, exported[name])


def test_a_whole_model_is_exported_with_each_parameter_once(tiny_model: Path) -> None:
    model = open_base(tiny_model)
    tensors, config = export_weights(model)
    assert config == {}
    assert set(model.state_dict()) - set(tensors) == {"lm_head.weight"}  # tied to the embedding
    assert sum(array.size for array in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert not any(np.shares_memory(tensors[n], p.detach().numpy()) for n, p in model.named_parameters())


def test_a_saved_adapter_gives_the_same_logits_and_digest(tiny_model: Path, tmp_path: Path) -> None:
    model = moved(tiny_model)
    digest, folder = save(model, tiny_model, tmp_path)
    again = open_model(tiny_model, folder, None, seed=0)
    assert np.array_equal(logits(again), logits(model))
    assert not np.array_equal(logits(again), logits(open_base(tiny_model)))
    tensors, config = export_weights(again)
    assert adapter_digest(tensors, config, base_digest(tiny_model)) == digest
    assert all(p.requires_grad == ("lora_" in n) for n, p in again.named_parameters())


def test_the_config_is_plain_and_names_no_path(tiny_model: Path) -> None:
    _, config = export_weights(open_model(tiny_model, None, LORA, seed=0))
    assert json.loads(json.dumps(config)) == config
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, None)
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections


def test_a_model_without_adapter_exports_all_its_tensors(tiny_model: Path) -> None:
    tensors, config = export_weights(open_model(tiny_model, None, None, seed=0))
    assert config == {}
    assert "model.embed_tokens.weight" in tensors


def test_merging_keeps_the_logits_and_makes_an_ordinary_folder(tiny_model: Path, tmp_path: Path) -> None:
    model = moved(tiny_model)
    _, folder = save(model, tiny_model, tmp_path / "adapters")
    merged = merge_adapter(tiny_model, folder, tmp_path / "merged")
    assert np.allclose(logits(open_base(merged)), logits(model), atol=1e-5)
    assert {p.name for p in merged.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [p.name for p in tmp_path.glob(".draft*")] == []


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    _, folder = save(moved(tiny_model), tiny_model, tmp_path / "adapters")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with pytest.raises(InputError, match="trained on another base"):
        check_adapter(folder, other)


@pytest.mark.parametrize(
    ("module", "shape", "says"),
    [
        ("model.layers.7.self_attn.q_proj", (4, 32), r"has no layer model\.layers\.7"),
        ("model.layers.0.self_attn.q_proj", (4, 48), "has 32 inputs in .*, 48 in it"),
    ],
)
def test_a_foreign_adapter_is_refused_by_its_shapes(
    tiny_model: Path, tmp_path: Path, module: str, shape: tuple[int, int], says: str
) -> None:
    from safetensors.numpy import save_file

    tensors = {f"base_model.model.{module}.lora_A.weight": np.zeros(shape, np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=says):
        check_adapter(tmp_path, tiny_model)


def test_pickled_adapters_are_not_read(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="can run code"):
        open_model(tiny_model, tmp_path, None, seed=0)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model folder"):
        open_base(tmp_path)


def test_targets_that_the_model_lacks_are_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.targets"):
        open_model(tiny_model, None, LoraConfig(targets=["no_such_layer"]), seed=0)
