"""A tiny model that vLLM can run on a CPU, an engine on it, and what its peers make of the same requests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.rollout.records import GenerationRequest, Sampling, SeedKey

from benchmarks.models import save_tokenizer

from ..models import make_adapter, save_model

Ask = Callable[..., GenerationRequest]


def ask(number: int, length: int = 6, *, n: int = 1, adapter: str | None = None, **sampling: Any) -> GenerationRequest:
    """A request with a random prompt; the number makes prompt and seed."""
    rng = np.random.default_rng(number)
    return GenerationRequest(
        request_id=f"r{number}",
        prompt=rng.integers(3, 250, length).astype(np.int32),
        sampling=Sampling(**{"max_tokens": 12, "temperature": 0.0} | sampling),
        seed=SeedKey(5, 0, number),
        n=n,
        adapter=adapter,
    )


def save_llama(folder: Path, seed: int = 0) -> Path:
    """A random Llama whose heads are as large as vLLM wants them on a CPU, with a byte-level tokenizer."""
    size = save_tokenizer(folder)
    return save_model(folder, "llama", seed, vocab_size=size, head_dim=32, max_position_embeddings=512)


def transformers_greedy(folder: Path, request: GenerationRequest, adapter: Path | None = None) -> list[int]:
    """The same tokens by transformers, under PEFT where there is an adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    prompt = torch.tensor(request.prompt[None].astype(np.int64))
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=request.sampling.max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("vllm") / "llama")


@pytest.fixture(scope="session")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """Two random adapters on the model: digest → folder, tensors, config."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: (root / name, *make_adapter(llama, root / name, seed)) for seed, name in enumerate("ab", 1)}


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Any]:
    """One vLLM for a module: its start takes many seconds."""
    from raylign.rollout.engines import ENGINES

    engine: Any = ENGINES["vllm"](llama, 8, 400, "float32", "cpu")
    yield engine
    engine.close()
