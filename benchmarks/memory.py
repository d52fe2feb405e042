"""The peak of a process's memory while it does one thing."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def peak_megabytes(prepare: Callable[..., Callable[[], Any]], *given: Any) -> float:
    """How much the resident memory of a fresh process grows at most while it does what `prepare` gave, in MB (1e6).

    One core and one thread, as everywhere here.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_growth, prepare, *given).result()


def _growth(prepare: Callable[..., Callable[[], Any]], *given: Any) -> float:
    import torch

    torch.set_num_threads(1)
    work = prepare(*given)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = _kilobytes("VmHWM")
    work()
    return round((_kilobytes("VmHWM") - before) * 1024 / 1e6, 1)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
