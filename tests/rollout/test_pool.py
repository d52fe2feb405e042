"""The pool on real Ray: what its workers refuse, and what it makes of that."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.config import Resources
from raylign.cluster.errors import InputError, RunFailed
from raylign.cluster.weights import ObjectStore, WeightVersion, model_digest
from raylign.rollout.config import RolloutConfig
from raylign.rollout.pool import RolloutPool
from raylign.rollout.worker import WorkerSpec
from safetensors.numpy import load_file

from .models import save_model

_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def _spec(base: Path) -> WorkerSpec:
    config = RolloutConfig(group_size=8, slots=8, resources=Resources(cpus=0.5))
    return WorkerSpec(base=base, dtype="float32", config=config, seed=3, max_length=64, stop_token_ids=(2,))


def _weights(base: Path) -> WeightVersion:
    tensors = load_file(base / "model.safetensors")
    return WeightVersion(1, model_digest(tensors), ObjectStore().send(tensors), {}, "base")


def test_a_version_that_every_worker_refuses_ends_the_run(tiny_model: Path, ray_session: str) -> None:
    pool = RolloutPool(prefix="refuse/", spec=_spec(tiny_model), wait_seconds=90, note=lambda kind, **_: None)
    try:
        pool.start(_weights(tiny_model), tick=lambda: None)
        with pytest.raises(RunFailed, match=r"every rollout worker refuses weight version 2.*got weights"):
            pool.set_weights(replace(_weights(tiny_model), version=2, digest="0" * 64))
    finally:
        pool.close()


def test_a_model_the_engine_refuses_ends_the_start_at_once_with_the_reason(
    tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "odd", "llama", rope_parameters=_DYNAMIC)
    for file in tiny_model.glob("*token*.json"):
        shutil.copy(file, base)
    notes: list[tuple[str, dict[str, Any]]] = []
    pool = RolloutPool(
        prefix="odd/", spec=_spec(base), wait_seconds=90, note=lambda kind, **fields: notes.append((kind, fields))
    )
    try:
        with pytest.raises(InputError, match="dynamic RoPE"):
            pool.start(_weights(base), tick=lambda: None)
    finally:
        pool.close()
    assert [kind for kind, _ in notes].count("worker_failed") == 1
