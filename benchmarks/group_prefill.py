"""Groups with a long shared prompt: how much of what prefilling it once can gain is gained."""

from functools import partial
from typing import get_args

from .arena import Arena
from .contestants import warm_up
from .measured import Case, Contest
from .models import SHAPES, Dtype
from .workloads import Workload

GROUP = 8
_PROMPT = 512
_COMPLETION = 32
_GROUPS = {"1M": 8, "25M": 4, "120M": 1}
"""Groups in a batch, so that ten pairs take minutes on one core."""


def possible_ratio(prompt: int, completion: int, group: int) -> float:
    """G(p+c)/(p+Gc): tokens computed when every row has its prompt prefilled, over those when each group has."""
    return group * (prompt + completion) / (prompt + group * completion)


def cases() -> list[Case]:
    """Named like `25M-fp32-p512-c32-G8-vs-generate`."""
    return [
        _case(size, dtype, workload(size, dtype, _GROUPS[size], _PROMPT, _COMPLETION))
        for size in _GROUPS
        for dtype in get_args(Dtype)
    ]


def quick_cases() -> list[Case]:
    """One small case."""
    return [_case("1M", "fp32", workload("1M", "fp32", 1, 64, 4))]


def workload(size: str, dtype: Dtype, groups: int, prompt: int, completion: int) -> Workload:
    """Some groups of eight with a prompt each."""
    return Workload(
        case=f"{size}-{dtype}-p{prompt}-c{completion}-G{GROUP}-vs-generate",
        vocabulary=SHAPES[size].vocabulary,
        prompt=prompt,
        lengths=(completion,) * (groups * GROUP),
        group=GROUP,
    )


def _case(size: str, dtype: Dtype, work: Workload) -> Case:
    return Case(
        name=work.case,
        peer="generate",
        unit="useful completion tokens/s",
        group=f"{size}-{dtype}",
        make=partial(_contest, size, dtype, work),
    )


def _contest(size: str, dtype: Dtype, work: Workload, arena: Arena) -> Contest:
    ours = arena.native(size, dtype, slots=len(work.lengths), max_length=work.longest)
    theirs = arena.generate(size, dtype)
    return Contest(
        ours=partial(ours.run, work),
        theirs=partial(theirs.run, work),
        warm_up=partial(warm_up, work, ours.run, theirs.run),
        limit_ratio=possible_ratio(work.prompt, work.lengths[0], GROUP),
        settings=work.describe(),
    )
