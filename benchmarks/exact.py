"""What exactness costs: an exact worker has one thread, one with `rollout.exact: false` as many as the machine's cores.

The same engine on the same requests, so the ratio is what a single worker gives up; two exact workers of one core each
are the other way to use two cores, and keep the promise.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from .arena import Arena
from .contestants import Native, warm_up
from .measured import Case, Contest, Measured
from .rollout import workload
from .workloads import Workload


def cases() -> list[Case]:
    """Named like `25M-fp32-one-thread-vs-all-cores`."""
    return [
        _case(size, workload(size, 32, "lognormal", f"{size}-fp32-one-thread-vs-all-cores")) for size in ("1M", "25M")
    ]


def quick_cases() -> list[Case]:
    """A few short rows on the smallest model."""
    return [_case("1M", Workload(case="1M-fp32-quick-threads", vocabulary=64, prompt=8, lengths=(2, 9, 4, 16)))]


def _case(size: str, work: Workload) -> Case:
    return Case(
        name=work.case,
        peer="all-cores",
        unit="useful completion tokens/s",
        group=f"{size}-fp32",
        make=partial(_contest, size, work),
    )


def _contest(size: str, work: Workload, arena: Arena) -> Contest:
    native = arena.native(size, "fp32", slots=len(work.lengths), max_length=work.longest)
    theirs = partial(_on_all_cores, native)
    return Contest(
        ours=partial(native.run, work),
        theirs=partial(theirs, work),
        warm_up=partial(warm_up, work, native.run, theirs),
        settings=work.describe() | {"cores": _CORES},
    )


_CORES = os.cpu_count() or 1


def _on_all_cores(native: Native, work: Workload, pair: int) -> Measured:
    with _all_cores():
        return native.run(work, pair)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Take every core and a thread on each, and give them back."""
    import torch

    bound, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, range(_CORES))
    torch.set_num_threads(_CORES)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, bound)
