"""Every engine of rollout/engines.py, built once for a model and shared by the tests that ask for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from raylign.rollout.engine import Engine
from raylign.rollout.engines import ENGINES

from benchmarks.models import save_tokenizer

from .models import make_adapter, save_model
from .reference import Reference

SLOTS, MAX_LENGTH = 8, 128


@dataclass(frozen=True)
class Traits:
    """What may be expected of an engine."""

    exact: bool
    """The same bits for a row in any company."""
    tolerance: float
    """How far its log-probs may lie from those of a plain forward."""
    goes_on: bool = True
    """Exact even where a row's tokens come as another's prompt: prompts and new tokens go through one product."""


TRAITS = {"native": Traits(exact=True, tolerance=1e-4), "vllm": Traits(exact=False, tolerance=1e-3)}
ON_A_GPU = Traits(exact=True, tolerance=2e-4, goes_on=False)

_WITHOUT_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed here: make test-vllm")

WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM has no attention for heads of fewer than 32 dimensions."""


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")],
    ),
]


class Shop:
    """Builds an engine for a model folder; keeps the last one, since some take half a minute to start."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.name, self._device = name, device
        self.traits = TRAITS[name] if device == "cpu" else ON_A_GPU
        self._kept: tuple[Path, Engine] | None = None

    def engine(self, folder: Path) -> Engine:
        if self._kept is None or self._kept[0] != folder or self._kept[1].busy:
            self.close()
            self._kept = folder, ENGINES[self.name](folder, SLOTS, MAX_LENGTH, "float32", self._device)
        return self._kept[1]

    def close(self) -> None:
        """End the engine that was kept; one with processes of its own must be gone before the next one starts."""
        if self._kept and (close := getattr(self._kept[1], "close", None)):
            close()
        self._kept = None


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the native engine computes."""
    return request.param


@pytest.fixture(
    scope="module",
    params=[
        "native",
        pytest.param("native-cuda", marks=DEVICES[1].marks),
        pytest.param("vllm", marks=[pytest.mark.vllm, _WITHOUT_VLLM]),
    ],
)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Shop(*request.param.split("-"))
    yield made
    made.close()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Model:
    """A random Llama with a byte-level tokenizer, its adapters' folders by digest, and how its libraries run it."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("conformance")
    folder = save_model(root / "base", "llama", **WIDE, vocab_size=save_tokenizer(root / "base"))
    kinds: dict[str, dict[str, Any]] = {
        "every-layer": {},
        "wide": {"r": 24},
        "attention": {"targets": ["q_proj", "v_proj"]},
        "rslora": {"rslora": True},
        "down": {"targets": ["down_proj"]},
    }
    for seed, (digest, kind) in enumerate(kinds.items(), 1):
        make_adapter(folder, root / digest, seed, **kind)
    adapters = {digest: root / digest for digest in kinds}
    return Model(folder, adapters, Reference(folder, adapters))


@pytest.fixture
def engine(shop: Shop, model: Model) -> Iterator[Engine]:
    """The engine on the model, idle and without adapters, as every test must leave it."""
    built = shop.engine(model.folder)
    assert not built.adapters()
    yield built
    assert not built.busy
    for digest in built.adapters():
        built.drop_adapter(digest)
