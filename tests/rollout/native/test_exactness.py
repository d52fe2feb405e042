"""The native engine's results bit for bit: whatever runs beside a row, in whichever slot, order or engine."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from raylign.rollout.engine import generate
from raylign.rollout.native.engine import NativeEngine
from raylign.rollout.records import GenerationRequest

from ..models import make_adapter, save_model
from ..runs import bits, request, run_in_turns


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


EXPERTS = {"mixtral", "qwen3-moe"}

Adapters = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def model(folder: Path, architecture: str) -> tuple[Path, Adapters]:
    base = save_model(folder / "model", architecture)
    targets = ["q_proj", "v_proj"] if architecture in EXPERTS else "all-linear"  # PEFT's on experts are not plain LoRA
    ranks = enumerate((4, 4, 20))
    return base, {f"adapter-{i}": make_adapter(base, folder / str(i), i, r=r, targets=targets) for i, r in ranks}


def engine(base: Path, adapters: Adapters, slots: int, dtype: Any, device: str) -> NativeEngine:
    built = NativeEngine(base, slots=slots, max_length=128, dtype=dtype, device=device)
    for digest, (tensors, config) in adapters.items():
        built.load_adapter(digest, tensors, config)
    return built


def mixed_requests(count: int, rng: random.Random) -> list[GenerationRequest]:
    """Groups of all kinds: prompts around a cache block's size, every adapter and none, every sampling setting."""
    return [
        request(
            i,
            rng.choice((1, 2, 5, 13, 30, 31, 32, 60)),
            n=rng.choice((1, 2, 5)),
            adapter=rng.choice((None, "adapter-0", "adapter-1", "adapter-2")),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.8)),
            top_k=rng.choice((0, 10)),
            min_p=rng.choice((0.0, 0.05)),
            top_logprobs=rng.choice((0, 0, 2, 7)),
            max_tokens=rng.choice((1, 2, 7, 20, 40)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("mixtral", "float32"),
        ("qwen3-moe", "bfloat16"),
        ("qwen3", "float32"),
        ("gemma3-sliding", "bfloat16"),
        ("gpt2", "float32"),
    ],
)
def test_any_company_slots_and_order_give_the_same_bits(dtype: Any, architecture: str, device: str, tmp_path: Path):
    """On a GPU with the same number of slots: a product's kernel, and so its sums, depend on how many rows it has."""
    if device == "cuda" and architecture in EXPERTS:
        pytest.skip("transformers multiplies all tokens of an expert at once, which is not exact on a GPU")
    base, adapters = model(tmp_path, architecture)
    rng = random.Random(3)
    requests = mixed_requests(12, rng)
    few, counts = (1, (3, 8, 13, 64)) if device == "cpu" else (16, (13, 16))
    small = engine(base, adapters, few, dtype, device)
    alone = {r.request_id: bits(generate(small, [r])[r.request_id]) for r in requests}
    for slots in counts:
        shuffled = rng.sample(requests, len(requests))
        turns = [shuffled[i : i + 2] for i in range(0, len(shuffled), 2)] if slots % 2 else [shuffled]
        got = run_in_turns(engine(base, adapters, slots, dtype, device), turns)
        assert {name: bits(completions) for name, completions in got.items()} == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_shared_by_one_two_or_four_engines_give_the_same_bits(dtype: Any, device: str, tmp_path: Path):
    base, adapters = model(tmp_path, "llama")
    rng = random.Random(7)
    requests = mixed_requests(16, rng)
    engines = [engine(base, adapters, 16, dtype, device) for _ in range(4)]
    results: list[dict[str, Any]] = []
    for count in (1, 2, 4, 4):
        shares: list[list[list[GenerationRequest]]] = [[] for _ in range(count)]
        for r in rng.sample(requests, len(requests)):
            shares[rng.randrange(count)].append([r])
        results.append({})
        for each, share in zip(engines, shares, strict=False):
            got = run_in_turns(each, share)
            results[-1] |= {name: bits(completions) for name, completions in got.items()}
    assert len(results[0]) == len(requests)
    assert all(result == results[0] for result in results[1:])
