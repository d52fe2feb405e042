"""The engines a recipe can name (`rollout.engine`), and how each is built, for rollout workers and replicas alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .engine import Engine

BuildEngine = Callable[[Path, int, int, Literal["float32", "bfloat16"], str], Engine]
"""From a model folder, slots, max_length, dtype and device, on the thread that will own the engine."""


def build_native(
    folder: Path, slots: int, max_length: int, dtype: Literal["float32", "bfloat16"], device: str
) -> Engine:
    """The embedded engine on one CPU thread: with two, the same row gives other bits in another slot."""
    import torch

    from .native.engine import NativeEngine

    torch.set_num_threads(1)
    return NativeEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device)


def build_vllm(folder: Path, slots: int, max_length: int, dtype: Literal["float32", "bfloat16"], device: str) -> Engine:
    """vLLM, where it is installed: its own processes, on as many threads as the actor reserves CPUs."""
    from .vllm.settings import prepare_environment

    prepare_environment(device)

    from .vllm.engine import VllmEngine

    return VllmEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device)


ENGINES: dict[str, BuildEngine] = {"native": build_native, "vllm": build_vllm}
