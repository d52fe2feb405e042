"""The engines a recipe can name (`rollout.engine`), and how each is built, for rollout workers and replicas alike."""

from pathlib import Path
from typing import Literal, Protocol

from .engine import Engine

Dtype = Literal["float32", "bfloat16"]


class BuildEngine(Protocol):
    """Makes an engine from a model folder, on the thread that will own it."""

    def __call__(
        self, folder: Path, slots: int, max_length: int, dtype: Dtype, device: str, *, threads: int = 1
    ) -> Engine:
        """`threads` is for matrix products on a CPU."""
        ...


def build_native(folder: Path, slots: int, max_length: int, dtype: Dtype, device: str, *, threads: int = 1) -> Engine:
    """The embedded engine; it is exact on one thread: with two, the same row gives other bits in another slot."""
    import torch

    from .native.engine import NativeEngine

    torch.set_num_threads(threads)
    return NativeEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device)


def build_vllm(folder: Path, slots: int, max_length: int, dtype: Dtype, device: str, *, threads: int = 1) -> Engine:
    """vLLM, where it is installed: its own processes, on as many threads as Ray gives the actor (its CPUs)."""
    from .vllm.settings import prepare_environment

    prepare_environment(device)

    from .vllm.engine import VllmEngine

    return VllmEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device)


ENGINES: dict[str, BuildEngine] = {"native": build_native, "vllm": build_vllm}
