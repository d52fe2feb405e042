"""What exactness costs: `rollout.exact: false` lets torch's own operations use all cores of a worker; the engine's
products use them either way, with the same bits. And what a worker's second core gives.
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

_CORES = os.cpu_count() or 1
PEERS = ("not-exact", "one-core")


def cases() -> list[Case]:
    """Named like `25M-fp32-exact-vs-not-exact` and `25M-fp32-exact-vs-one-core`."""
    return [
        _case(size, peer, workload(size, 32, "lognormal", f"{size}-fp32-exact-vs-{peer}"))
        for size in ("1M", "25M")
        for peer in PEERS
    ]


def quick_cases() -> list[Case]:
    """A few short rows on the smallest model."""
    work = Workload(case="1M-fp32-quick-exact", vocabulary=64, prompt=8, lengths=(2, 9, 4, 16))
    return [_case("1M", "not-exact", work)]


def _case(size: str, peer: str, work: Workload) -> Case:
    return Case(
        name=work.case,
        peer=peer,
        unit="useful completion tokens/s",
        group=f"{size}-fp32",
        make=partial(_contest, size, peer, work),
    )


def _contest(size: str, peer: str, work: Workload, arena: Arena) -> Contest:
    room = {"slots": len(work.lengths), "max_length": work.longest}
    all_cores = arena.native(size, "fp32", threads=_CORES, **room)
    ours = partial(_on_all_cores, all_cores, 1)
    theirs = arena.native(size, "fp32", **room).run if peer == "one-core" else partial(_on_all_cores, all_cores, _CORES)
    return Contest(
        ours=partial(ours, work),
        theirs=partial(theirs, work),
        warm_up=partial(warm_up, work, ours, theirs),
        settings=work.describe() | {"cores": _CORES},
    )


def _on_all_cores(native: Native, torch_threads: int, work: Workload, pair: int) -> Measured:
    with _all_cores(torch_threads):
        return native.run(work, pair)


@contextmanager
def _all_cores(torch_threads: int) -> Iterator[None]:
    """Take every core, and so many threads for torch; give them back."""
    import torch

    bound, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, range(_CORES))
    torch.set_num_threads(torch_threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, bound)
