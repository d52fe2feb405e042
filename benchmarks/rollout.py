"""Useful completion tokens per second against TRL's generation path, continuous batching and vLLM."""

from functools import partial
from typing import Any, get_args

from .arena import Arena
from .contestants import warm_up
from .limits import tokens_per_second
from .measured import Case, Contest
from .models import SHAPES, Dtype
from .workloads import Lengths, Workload, lognormal_lengths

_REQUESTS_AND_MEDIAN = {
    ("1M", 32): (64, 64),
    ("1M", 512): (64, 64),
    ("25M", 32): (64, 32),
    ("25M", 512): (32, 32),
    ("120M", 32): (32, 16),
    ("120M", 512): (8, 16),
}
"""Chosen so that ten pairs of a case take minutes on one core; by size of the model and of the prompt."""

PEERS = ("generate", "continuous-batching", "vllm-cpu")


def cases() -> list[Case]:
    """Named like `25M-fp32-p32-lognormal-vs-generate`."""
    return [
        _case(size, dtype, workload(size, prompt, lengths, f"{size}-{dtype}-p{prompt}-{lengths}-vs-{peer}"), peer)
        for size in ("1M", "25M", "120M")
        for dtype in get_args(Dtype)
        for prompt in (32, 512)
        for lengths in get_args(Lengths)
        for peer in PEERS
    ]


def quick_cases() -> list[Case]:
    """One small case of each peer that runs in this process."""
    vocabulary = SHAPES["1M"].vocabulary
    works = {
        peer: Workload(case=f"1M-fp32-quick-vs-{peer}", vocabulary=vocabulary, prompt=8, lengths=(2, 9, 4, 16))
        for peer in PEERS[:2]
    }
    return [_case("1M", "fp32", work, peer) for peer, work in works.items()]


def workload(size: str, prompt: int, lengths: Lengths, case: str) -> Workload:
    """The requests of a case; equal lengths are the lognormal ones' median."""
    requests, median = _REQUESTS_AND_MEDIAN[size, prompt]
    drawn = lognormal_lengths(requests, median).tolist() if lengths == "lognormal" else [median] * requests
    return Workload(case=case, vocabulary=SHAPES[size].vocabulary, prompt=prompt, lengths=tuple(drawn))


def _case(size: str, dtype: Dtype, work: Workload, peer: str) -> Case:
    return Case(
        name=work.case,
        peer=peer,
        unit="useful completion tokens/s",
        group=f"{size}-{dtype}",
        make=partial(_contest, size, dtype, work, peer),
    )


def _contest(size: str, dtype: Dtype, work: Workload, peer: str, arena: Arena) -> Contest:
    theirs = _peer(arena, size, dtype, work, peer)
    ours = arena.native(size, dtype, slots=len(work.lengths), max_length=work.longest)
    rows = len(work.lengths)
    return Contest(
        ours=partial(ours.run, work),
        theirs=partial(theirs.run, work),
        warm_up=partial(warm_up, work, ours.run, theirs.run),
        limit=partial(tokens_per_second, SHAPES[size], work, dtype, rows),
        settings=work.describe(),
    )


def _peer(arena: Arena, size: str, dtype: Dtype, work: Workload, peer: str) -> Any:
    if peer == "generate":
        return arena.generate(size, dtype)
    if peer == "continuous-batching":
        return arena.continuous_batching(size, dtype, slots=len(work.lengths), max_length=work.longest)
    return arena.vllm(size, dtype)
