"""The engines a recipe can name (`rollout.engine`), and how each is built, for rollout workers and replicas alike."""

from pathlib import Path
from typing import Literal, Protocol

from ..cluster.imports import importing
from .engine import Engine

Dtype = Literal["float32", "bfloat16"]


class BuildEngine(Protocol):
    """Makes an engine from a model folder, on the thread that will own it."""

    def __call__(
        self,
        folder: Path,
        slots: int,
        max_length: int,
        dtype: Dtype,
        device: str,
        *,
        threads: int = 1,
        exact: bool = True,
    ) -> Engine:
        """`threads` is how many a CPU may use; `exact` wants a row's bits to be its own."""
        ...


def build_native(
    folder: Path, slots: int, max_length: int, dtype: Dtype, device: str, *, threads: int = 1, exact: bool = True
) -> Engine:
    """The embedded engine. Its own products give the same bits on any number of threads, torch's operations do not:
    with two threads, the same row has others in another slot."""
    with importing():
        import torch

        from .native.engine import NativeEngine

    torch.set_num_threads(1 if exact else threads)
    return NativeEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device, threads=threads)


def build_vllm(
    folder: Path, slots: int, max_length: int, dtype: Dtype, device: str, *, threads: int = 1, exact: bool = True
) -> Engine:
    """vLLM, where it is installed: its own processes, on as many threads as Ray gives the actor (its CPUs)."""
    from .vllm.settings import prepare_environment

    prepare_environment(device)

    from .vllm.engine import VllmEngine

    return VllmEngine(folder, slots=slots, max_length=max_length, dtype=dtype, device=device)


ENGINES: dict[str, BuildEngine] = {"native": build_native, "vllm": build_vllm}
