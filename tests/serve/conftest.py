"""Adapters for the tiny model, and a registry that holds it with two of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.weights import save_adapter
from raylign.serve.registry import Entry, Registry

from .live import Live, live

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}


def tensors(seed: int) -> dict[str, np.ndarray]:
    """A LoRA of rank 2 on the query and output projections of the tiny model's first layer."""
    rng = np.random.default_rng(seed)
    name = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    made: dict[str, np.ndarray] = {}
    for module in ("q_proj", "o_proj"):
        made[name.format(module, "A")] = rng.normal(size=(2, 32)).astype(np.float32)
        made[name.format(module, "B")] = rng.normal(size=(32, 2)).astype(np.float32)
    return made


@dataclass(frozen=True)
class Shelf:
    """A registry with a base and two adapters, `first` and `second` by alias."""

    registry: Registry
    base: Entry
    first: Entry
    second: Entry


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Shelf:
    root = tmp_path_factory.mktemp("storage")
    registry = Registry(root / "registry")
    base = registry.register_base(tiny_model)
    registry.promote("tiny-base", base.digest)
    adapters = []
    for seed, alias in enumerate(("first", "second")):
        _, folder = save_adapter(root / "adapters", tensors(seed), CONFIG, {"base_digest": base.digest})
        adapters.append(registry.publish(folder, base))
        registry.promote(alias, adapters[-1].digest)
    return Shelf(registry, base, *adapters)


@pytest.fixture(scope="session")
def served(shelf: Shelf) -> Iterator[Live]:
    """The shelf's base and adapters, on the native engine, without keys."""
    with live(shelf.registry, "tiny-base") as up:
        yield up
