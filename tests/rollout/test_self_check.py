"""The proof at a worker's start, and that it can fail."""

from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.cluster.errors import RunFailed
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.native.linear import EngineLinear
from raylign.rollout.self_check import check_exactness

from .models import make_adapter, save_model


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_passes_with_one_thread_and_with_adapters(dtype, tmp_path: Path):
    folder = save_model(tmp_path / "model", "qwen3")
    engine = NativeEngine(folder, slots=10, max_length=64, dtype=dtype)
    check_exactness(engine)
    for seed in (1, 2):
        engine.load_adapter(f"a{seed}", *make_adapter(folder, tmp_path / str(seed), seed))
    check_exactness(engine)
    assert not engine.busy


def test_it_names_what_differs_when_arithmetic_depends_on_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = NativeEngine(save_model(tmp_path, "llama"), slots=16, max_length=64)
    plain = EngineLinear.on_arrays

    def by_rows(self: EngineLinear, x: np.ndarray) -> np.ndarray:
        return plain(self, x) * np.float32(1 + 1e-6 * (len(x) > 8))

    monkeypatch.setattr(EngineLinear, "on_arrays", by_rows)
    with pytest.raises(RunFailed, match=r"depends on which rows run together \(a prompt of \d+ tokens, new token \d+"):
        check_exactness(engine)


def test_it_wants_an_idle_engine_and_works_in_a_short_cache(tmp_path: Path):
    engine = NativeEngine(save_model(tmp_path, "llama"), slots=3, max_length=9)
    check_exactness(engine)
