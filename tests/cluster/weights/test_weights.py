"""Digests say what the bytes are; versions only grow."""

from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.cluster.weights import (
    Parcel,
    WeightStore,
    WeightVersion,
    adapter_digest,
    joined,
    keep_version,
    kept_version,
    load_adapter,
    save_adapter,
    tensors_digest,
    version_digest,
)

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "k"]}


def test_the_digest_is_of_the_content() -> None:
    again = {"b": TENSORS["b"].copy(), "a": np.asfortranarray(TENSORS["a"])}
    assert tensors_digest(again) == tensors_digest(TENSORS)
    for other in (
        {**TENSORS, "a": TENSORS["a"].reshape(3, 2)},
        {**TENSORS, "a": TENSORS["a"].astype(np.float64)},
        {"c": TENSORS["a"], "b": TENSORS["b"]},
        {**TENSORS, "b": np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)},
    ):
        assert tensors_digest(other) != tensors_digest(TENSORS)


def test_scale_targets_and_base_are_part_of_an_adapter() -> None:
    digest = adapter_digest(TENSORS, CONFIG, "base")
    assert adapter_digest(TENSORS, CONFIG | {"target_modules": {"k", "q"}, "inference_mode": True}, "base") == digest
    assert adapter_digest(TENSORS, CONFIG | {"lora_alpha": 8}, "base") != digest
    assert adapter_digest(TENSORS, CONFIG, "other") != digest


def test_an_adapter_folder_is_written_once_and_reads_back(tmp_path: Path) -> None:
    digest, folder = save_adapter(tmp_path, TENSORS, CONFIG, {"base_digest": "base"})
    assert folder.name == digest == adapter_digest(TENSORS, CONFIG, "base")
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert save_adapter(tmp_path, TENSORS, CONFIG, {"base_digest": "base"}) == (digest, folder)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before
    tensors, config = load_adapter(folder)
    assert adapter_digest(tensors, config, "base") == digest
    assert [p.name for p in tmp_path.iterdir()] == [digest]


def test_pickled_adapters_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load_adapter(tmp_path)


def version(number: int, digest: str) -> WeightVersion:
    return WeightVersion(version=number, digest=digest, parcel=Parcel(()), config={}, base="b")


def test_versions_grow_and_an_update_must_show() -> None:
    store = WeightStore()
    with pytest.raises(RunFailed, match="no weights"):
        _ = store.current
    store.publish(version(0, "a"), changed=False)
    store.publish(version(1, "a"), changed=False)  # a step without any variance
    with pytest.raises(RunFailed, match="after a non-zero update"):
        store.publish(version(2, "a"), changed=True)
    store.publish(version(2, "b"), changed=True)
    with pytest.raises(RunFailed, match="does not follow"):
        store.publish(version(2, "c"), changed=True)
    assert store.current.digest == "b"


def test_a_step_comes_from_its_version_and_older_ones_are_let_go() -> None:
    store = WeightStore(staleness=2)
    assert not store.has(0)
    store.begin_at(version(0, "0"))
    assert [store.of_step(step).version for step in range(3)] == [0, 0, 0]
    with pytest.raises(RunFailed, match="step 3 comes from weight version 1, and there is 0"):
        store.of_step(3)
    for number in (1, 2, 3):
        store.publish(version(number, str(number)), changed=True)
    assert [v.version for v in store.before()] == [1, 2]
    assert [store.of_step(step).version for step in (3, 4, 5)] == [1, 2, 3]
    assert not store.has(2)
    store.begin_at(version(2, "2"), [version(0, "0"), version(1, "1")])
    assert [store.of_step(step).version for step in (2, 3, 4)] == [0, 1, 2]
    with pytest.raises(RunFailed, match="weight version 1 was 1 and came out as x when it was made again"):
        store.begin_at(version(3, "3"), [version(1, "x"), version(2, "2")])


def test_a_version_that_a_checkpoint_keeps_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1.5], np.float32)}
    keep_version(tmp_path, 7, joined(tensors), {"r": 4, "target_modules": ["q"]})
    assert [path.name for path in tmp_path.iterdir()] == ["version-000007.safetensors"]
    back, config = kept_version(tmp_path, 7)
    assert config == {"r": 4, "target_modules": ["q"]}
    assert version_digest(joined(back), config, "base") == version_digest(joined(tensors), config, "base")
    with pytest.raises(RunFailed, match="weight version 8 cannot be written to"):
        keep_version(tmp_path / "gone", 8, joined(tensors), {})
