"""The native engine's own kernels, its shapes and its graphs on a GPU, against the same engine on a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.rollout.engine import generate
from raylign.rollout.native.cache import Batch
from raylign.rollout.native.device import _tiles
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.records import Completion

from ..models import ARCHITECTURES, make_adapter, save_model
from ..runs import bits, request

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]

TOLERANCE = 2e-4
"""Log-probs in float32 whose sums go in another order."""


def test_a_tile_is_neighbours_of_one_row() -> None:
    positions = np.array([5, 6, 7, 8, 9, 0, 1, 3])
    rows = np.array([2, 2, 2, 2, 2, 3, 3, 3])
    batch = Batch(positions, positions, rows, np.zeros((4, 1), np.int32), rows * 0)
    begins, counts = _tiles(batch, 4)
    assert begins.tolist() == [0, 4, 5, 7]
    assert counts.tolist() == [4, 1, 2, 1]
    assert [x.tolist() for x in _tiles(batch, 1)] == [list(range(8)), [1] * 8]


def engine(base: Path, device: str, **options: Any) -> NativeEngine:
    return NativeEngine(base, **{"slots": 8, "max_length": 700, "device": device} | options)


def gap(ours: list[Completion], theirs: list[Completion]) -> float:
    """How far log-probs lie apart, of completions with the same tokens."""
    assert [c.tokens.tolist() for c in ours] == [c.tokens.tolist() for c in theirs]
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=on_a_gpu) for name in ARCHITECTURES])
def test_a_gpu_gives_the_cpus_tokens(architecture: str, tmp_path: Path) -> None:
    """Prompts in several pieces and rows of several chunks among them."""
    longer = {"n_positions": 1024} if architecture == "gpt2" else {"max_position_embeddings": 1024}
    base = save_model(tmp_path, architecture, **longer)
    requests = [request(i, length, n=2) for i, length in enumerate((1, 30, 33, 300, 640))]
    here, there = (generate(engine(base, device), requests) for device in ("cpu", "cuda"))
    for name, completions in here.items():
        assert gap(there[name], completions) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(*both, marks=on_a_gpu)
        for both in (("qwen2", "float32"), ("qwen2", "bfloat16"), ("gpt2", "bfloat16"))
    ],
)
def test_new_weights_and_adapters_take_effect_in_graphs_that_are_there(
    architecture: str, dtype: Any, tmp_path: Path
) -> None:
    base, other = (save_model(tmp_path / str(seed), architecture, seed=seed) for seed in (1, 2))
    built, wanted = engine(base, "cuda", dtype=dtype), engine(other, "cuda", dtype=dtype)
    asked = [request(1, 40, n=3, temperature=0)]
    before = generate(built, asked)["r1"]
    for i, rank in enumerate((4, 20, 4, 40)):  # of which some need memory elsewhere
        built.load_adapter(f"a{i}", *make_adapter(base, tmp_path / f"a{i}", i, r=rank))
    own = {generate(built, [replace(asked[0], adapter=f"a{i}")])["r1"][0].tokens.tobytes() for i in range(4)}
    assert len(own | {before[0].tokens.tobytes()}) == 5
    assert bits(generate(built, asked)["r1"]) == bits(before)
    from safetensors.torch import load_file

    built.load_base({name: t.float().numpy() for name, t in load_file(other / "model.safetensors").items()})
    assert bits(generate(built, asked)["r1"]) == bits(generate(wanted, asked)["r1"]) != bits(before)
