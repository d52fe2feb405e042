"""The pool with real engines: the same tokens whatever becomes of its workers, and what they refuse."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.config import ElasticWorkers, RoleResources
from raylign.cluster.errors import InputError, RunFailed
from raylign.cluster.weights import ObjectStore, WeightVersion, joined, tensors_digest
from raylign.rollout.config import RolloutConfig, SamplingConfig
from raylign.rollout.ledger import GroupState, Ledger
from raylign.rollout.pool import RolloutPool
from raylign.rollout.records import Group
from raylign.rollout.worker import RolloutActor, WorkerSpec
from safetensors.numpy import load_file

from .models import save_model
from .scripted import in_turn

_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def _spec(base: Path, workers: int = 1) -> WorkerSpec:
    config = RolloutConfig(
        group_size=8,
        slots=16,
        workers=ElasticWorkers(min=1, max=3, start=workers),
        sampling=SamplingConfig(max_tokens=20),
        resources=RoleResources(cpus=0.5),
    )
    return WorkerSpec(base=base, dtype="float32", config=config, seed=3, max_length=64, stop_token_ids=(2,))


def _pool(name: str, spec: WorkerSpec, note: Callable[..., None] = lambda kind, **_: None, **role: type) -> RolloutPool:
    return RolloutPool(prefix=f"{name}/", spec=spec, wait_seconds=90, note=note, **role)


def _weights(base: Path) -> WeightVersion:
    tensors = load_file(base / "model.safetensors")
    return WeightVersion(1, tensors_digest(tensors), ObjectStore().send(joined(tensors)), {}, "base")


def _faulty(folder: Path) -> type:
    """Real workers that hold groups while `hold` is there, run out of memory once, and say where their process is."""

    class Faulty(RolloutActor):
        def generate(self, group: Group, call: int) -> Group | None:
            import os
            import time

            draft = folder / f"draft-{call}"
            draft.write_text(str(os.getpid()))
            draft.rename(folder / f"pid-{self._name.rpartition('/')[2]}")
            while (folder / "hold").exists():
                time.sleep(0.01)
            if group.index == 4 and (folder / "full").exists():
                (folder / "full").unlink()
                raise MemoryError("no room for another block")
            return super().generate(group, call)

    return Faulty


def _turn_until(pool: RolloutPool, reached: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
    while not reached():
        pool.turn(tick)


def _tokens(pool: RolloutPool, weights: WeightVersion, tick: Callable[[], None]) -> list[Any]:
    """Tokens and log-probs of a step of eight groups, in order."""
    groups = [Group(step=1, index=i, prompt=np.array([5, 6 + i], np.int32), row={}) for i in range(8)]
    ledger = Ledger(1, len(groups), weights.version, weights.digest)
    came: list[int] = []
    pool.begin(groups, ledger, weights, lambda group: came.append(group.index))
    _turn_until(pool, lambda: ledger.complete(GroupState.GENERATED), tick)
    assert sorted(came) == list(range(8))
    return [(s.tokens.tolist(), s.logprobs.tolist()) for g in ledger.batch() for s in g.samples]


def test_tokens_are_the_same_when_a_worker_is_killed_one_runs_out_of_memory_and_one_joins(
    tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    weights = _weights(tiny_model)
    notes: list[tuple[str, dict[str, Any]]] = []
    alone = _pool("alone", _spec(tiny_model))
    troubled = _pool(
        "troubled", _spec(tiny_model, 2), lambda kind, **fields: notes.append((kind, fields)), role=_faulty(tmp_path)
    )

    def lost() -> list[str]:
        return [fields["reason"] for kind, fields in notes if kind == "worker_lost"]

    def kill() -> None:
        os.kill(int((tmp_path / "pid-rollout-0").read_text()), signal.SIGKILL)
        troubled.scale(3)

    try:
        troubled.prepare()
        alone.start(weights, tick=lambda: None)
        undisturbed = _tokens(alone, weights, lambda: None)
        alone.close()
        (tmp_path / "hold").touch()
        (tmp_path / "full").touch()
        troubled.start(weights, tick=lambda: None)
        held = in_turn(
            [
                ((tmp_path / "pid-rollout-0").exists, kill),
                (lambda: len(lost()) == 1, (tmp_path / "hold").unlink),
            ]
        )
        assert _tokens(troubled, weights, held) == undisturbed
    finally:
        alone.close()
        troubled.close()
    assert len(lost()) == 2
    assert "MemoryError: no room for another block" in lost()[1]
    assert len({str(sample) for sample in undisturbed}) > 32


def test_a_version_that_every_worker_refuses_ends_the_run(tiny_model: Path, ray_session: str) -> None:
    pool = _pool("refuse", _spec(tiny_model))
    try:
        pool.start(_weights(tiny_model), tick=lambda: None)
        pool.set_weights(replace(_weights(tiny_model), version=2, digest="0" * 64))
        with pytest.raises(RunFailed, match=r"every rollout worker refuses weight version 2.*got weights"):
            _turn_until(pool, lambda: False)
    finally:
        pool.close()


def test_a_model_the_engine_refuses_ends_the_start_at_once_with_the_reason(
    tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "odd", "llama", rope_parameters=_DYNAMIC)
    for file in tiny_model.glob("*token*.json"):
        shutil.copy(file, base)
    notes: list[tuple[str, dict[str, Any]]] = []
    pool = _pool("odd", _spec(base), lambda kind, **fields: notes.append((kind, fields)))
    try:
        with pytest.raises(InputError, match="dynamic RoPE"):
            pool.start(_weights(base), tick=lambda: None)
    finally:
        pool.close()
    assert [kind for kind, _ in notes].count("worker_failed") == 1
