"""On a GPU, without Ray: generation, mixed adapters, the policy update and both together, against the peers' own paths.

Models are random ones of half a billion parameters. `generate` is TRL's GRPO path; a step of `grpo` is generation, the
update and, on our side, the new adapter in the engine, on theirs `generate` and the loss path on the same model. The
limit of generation is the time that reading all weights takes, once for each token of the longest completion.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from . import group_prefill, update
from .arena import Arena
from .contestants import ContinuousBatching, Generate, Native, warm_up
from .harness import all_cores
from .measured import Case, Contest, Measured, Skipped, measure
from .mixed_adapters import PeftPeer, adapted, names_for
from .models import SHAPES, Dtype, load_model
from .trl_peer import TrlUpdate, padded
from .workloads import Lengths, Workload, lognormal_lengths

_SIZE = "500M"
_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "bf16": 0.1}


def cases() -> list[Case]:
    """Named like `rollout-500M-bf16-p32-lognormal-vs-generate`."""
    both, mixed = ("lognormal", "equal"), (32, 32, 8)
    return [
        *(_rollout(_SIZE, "bf16", prompt, 64, 32, kind, "generate") for prompt in (32, 512) for kind in both),
        _group_prefill(_SIZE, "bf16", 8, 512, 32),
        *(_mixed(_SIZE, "bf16", mixed, 16, count, "base") for count in (1, 4, 16)),
        *(_mixed(_SIZE, "bf16", mixed, 16, 16, peer) for peer in ("peft", "switching")),
        _update(_SIZE, "lora", "bf16", 512, 64, 64),
        _grpo(_SIZE, "bf16", 256, 64, 64),
        _update(_SIZE, "lora", "fp32", 512, 32, 64),
        _update(_SIZE, "full", "fp32", 512, 32, 64),
        _rollout(_SIZE, "fp32", 32, 64, 32, "lognormal", "generate"),
        *(_rollout(_SIZE, "bf16", 32, 64, 32, kind, "continuous-batching") for kind in both),
        _mixed(_SIZE, "bf16", mixed, 64, 64, "base"),
    ]


def quick_cases() -> list[Case]:
    """One of each kind on the smallest model."""
    return [
        _rollout("1M", "bf16", 32, 8, 8, "lognormal", "generate"),
        _rollout("1M", "fp32", 32, 8, 8, "lognormal", "continuous-batching"),
        _group_prefill("1M", "bf16", 2, 64, 4),
        *(_mixed("1M", "bf16", (8, 8, 4), 4, 4, peer) for peer in ("base", "peft", "switching")),
        _update("1M", "lora", "fp32", 32, 16, 16),
        _update("1M", "full", "fp32", 32, 16, 16),
        _update("1M", "lora", "bf16", 32, 16, 16),
        _grpo("1M", "bf16", 32, 16, 8),
    ]


def _case(name: str, peer: str, unit: str, group: str, make: Callable[[Arena], Contest]) -> Case:
    def here(arena: Arena) -> Contest:
        import torch

        if not torch.cuda.is_available():
            raise Skipped("no GPU")
        contest = make(arena)
        return replace(contest, ours=_whole(contest.ours), theirs=_whole(contest.theirs))

    return Case(name=name, peer=peer, unit=unit, group=group, make=here)


def _whole(side: Callable[[int], Measured]) -> Callable[[int], Measured]:
    """With all cores, and without work that is still under way on the device."""

    def run(pair: int) -> Measured:
        import torch

        torch.cuda.synchronize()
        with all_cores():
            return side(pair)

    return run


def _timed(amount: float, work: Callable[[], Any]) -> Measured:
    import torch

    def to_its_end() -> None:
        work()
        torch.cuda.synchronize()

    return measure(amount, to_its_end)


def _generate(folder: Any, dtype: Dtype) -> Generate:
    return Generate(load_model(folder, dtype, "cuda"))


def _native(arena: Arena, size: str, dtype: Dtype, work: Workload) -> Native:
    slots, longest = len(work.lengths), work.longest
    return arena.get(Native, arena.folder(size, dtype), dtype, slots=slots, max_length=longest, device="cuda")


def _rollout(size: str, dtype: Dtype, prompt: int, requests: int, median: int, kind: Lengths, peer: str) -> Case:
    lengths = lognormal_lengths(requests, median).tolist() if kind == "lognormal" else [median] * requests
    name = f"rollout-{size}-{dtype}-p{prompt}-{kind}-vs-{peer}"
    work = Workload(case=name, vocabulary=SHAPES[size].vocabulary, prompt=prompt, lengths=tuple(lengths))

    def make(arena: Arena) -> Contest:
        folder = arena.folder(size, dtype)
        theirs: Any = arena.get(_generate, folder, dtype)
        if peer != "generate":
            theirs = arena.get(
                ContinuousBatching, folder, dtype, slots=requests, max_length=work.longest, device="cuda"
            )
        ours = _native(arena, size, dtype, work)
        return Contest(
            ours=partial(ours.run, work),
            theirs=partial(theirs.run, work),
            warm_up=partial(warm_up, work, ours.run, theirs.run),
            limit=lambda: work.useful / (max(lengths) * SHAPES[size].parameters * _BYTES[dtype] / _bandwidth()),
            settings=work.describe(),
        )

    return _case(name, peer, "useful completion tokens/s", f"{size}-{dtype}", make)


def _bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        to.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * len(source) / best


def _group_prefill(size: str, dtype: Dtype, groups: int, prompt: int, completion: int) -> Case:
    work = group_prefill.workload(size, dtype, groups, prompt, completion)
    work = replace(work, case=f"group_prefill-{work.case}")

    def make(arena: Arena) -> Contest:
        ours, theirs = _native(arena, size, dtype, work), arena.get(_generate, arena.folder(size, dtype), dtype)
        return Contest(
            ours=partial(ours.run, work),
            theirs=partial(theirs.run, work),
            warm_up=partial(warm_up, work, ours.run, theirs.run),
            limit_ratio=group_prefill.possible_ratio(prompt, completion, group_prefill.GROUP),
            settings=work.describe(),
        )

    return _case(work.case, "generate", "useful completion tokens/s", f"{size}-{dtype}", make)


def _mixed(size: str, dtype: Dtype, sizes: tuple[int, int, int], loaded: int, count: int, peer: str) -> Case:
    rows, prompt, completion = sizes
    name = f"mixed_adapters-{size}-{dtype}-A{count}-vs-{peer}"
    work = Workload(case=name, vocabulary=SHAPES[size].vocabulary, prompt=prompt, lengths=(completion,) * rows)

    def make(arena: Arena) -> Contest:
        ours: Native = arena.get(adapted, arena, size, dtype, rows, work.longest, loaded, "cuda")
        peft: PeftPeer = arena.get(PeftPeer, arena.folder(size, dtype), dtype, loaded, "cuda")

        def our_side(work: Workload, pair: int) -> Measured:
            return ours.run(work, pair, names_for(rows, count, pair))

        def their_side(work: Workload, pair: int) -> Measured:
            if peer == "base":
                return ours.run(work, pair)
            return (peft.mixed if peer == "peft" else peft.switching)(work, count, pair)

        return Contest(
            ours=partial(our_side, work),
            theirs=partial(their_side, work),
            warm_up=partial(warm_up, work, our_side, their_side),
            settings={**work.describe(), "adapters": count, "loaded": loaded},
        )

    return _case(name, peer, "completion tokens/s", f"{size}-{dtype}", make)


def _policy(folder: Any, kind: update.Kind, dtype: Dtype) -> Any:
    return update.policy(folder, kind, {"fp32": "float32", "bf16": "bfloat16"}[dtype], 1)


def _trl(folder: Any, kind: update.Kind, dtype: Dtype, rows: int) -> TrlUpdate:
    """Micro-batches of eight, without checkpointing."""
    made = TrlUpdate(
        folder,
        adapter=kind == "lora",
        rows=rows,
        micro_rows=update.GROUP,
        checkpointing=False,
        dtype=dtype,
        device="cuda",
        bf16=dtype == "bf16",
    )
    made.trainer.model.to("cuda")
    return made


def _update(size: str, kind: update.Kind, dtype: Dtype, prompt: int, rows: int, median: int) -> Case:
    name = f"update-{size}-{kind}-{dtype}-p{prompt}-vs-trl"
    work = replace(update.workload(size, prompt, rows, median), case=name)

    def make(arena: Arena) -> Contest:
        import torch

        folder = arena.folder(size, dtype)
        ours, theirs = _policy(folder, kind, dtype), _trl(folder, kind, dtype, rows)
        gap = update.gradient_gap(ours, theirs, update.samples_of(work, 0), "cuda")
        if gap > _TOLERANCES[dtype]:
            raise RuntimeError(f"{name}: the gradients differ by {gap:.1e} of their norm")
        peaks: dict[str, float] = {}
        settings = {**work.describe(), "gradient_gap": gap, "peak_megabytes": peaks}

        def side(whose: str, pair: int) -> Measured:
            samples = update.samples_of(work, pair)
            batch = padded(samples, "cuda")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            real = update.real_tokens(samples)
            if whose == "ours":
                took = _timed(real, lambda: ours.update(samples, 0, 0.0))
            else:
                took = _timed(real, lambda: theirs.update(batch))
            peaks[whose] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
            return took

        return Contest(
            ours=partial(side, "ours"),
            theirs=partial(side, "theirs"),
            warm_up=lambda: (side("ours", 0), side("theirs", 0)),
            settings=settings,
        )

    return _case(name, "trl", "real tokens/s", f"{size}-{dtype}", make)


def _grpo(size: str, dtype: Dtype, prompt: int, rows: int, completion: int) -> Case:
    name = f"grpo-{size}-lora-{dtype}-p{prompt}-vs-trl"
    group = update.GROUP
    lengths = lognormal_lengths(rows // group, completion).repeat(group).tolist()
    work = Workload(case=name, vocabulary=SHAPES[size].vocabulary, prompt=prompt, lengths=tuple(lengths), group=group)

    def make(arena: Arena) -> Contest:
        folder = arena.folder(size, dtype)
        native, policy = _native(arena, size, dtype, work), _policy(folder, "lora", dtype)
        theirs = _trl(folder, "lora", dtype, rows)
        generate = Generate(theirs.trainer.model)
        names = ("ours/generate", "ours/update", "ours/publish", "theirs/generate", "theirs/update")
        phases: dict[str, list[float]] = {name: [] for name in names}
        current: list[str] = []
        versions = itertools.count()

        def noted(phase: str, work: Callable[[], Any]) -> None:
            phases[phase].append(round(_timed(1, work).seconds, 5))

        def publish() -> None:
            tensors, config = policy.export()
            native.engine.load_adapter(f"version-{next(versions)}", tensors, config)
            for old in current:
                native.engine.drop_adapter(old)
            current[:] = native.engine.adapters()

        def our_step(work: Workload, pair: int) -> Measured:
            samples, adapters = update.samples_of(work, pair), current * len(work.lengths)

            def step() -> None:
                noted("ours/generate", lambda: native.run(work, pair, adapters))
                noted("ours/update", lambda: policy.update(samples, 0, 0.0))
                noted("ours/publish", publish)

            return _timed(1, step)

        def their_step(work: Workload, pair: int) -> Measured:
            samples = update.samples_of(work, pair)

            def step() -> None:
                theirs.trainer.model.eval()
                noted("theirs/generate", lambda: generate.run(work, pair))
                theirs.trainer.model.train()
                noted("theirs/update", lambda: theirs.update(padded(samples, "cuda")))

            return _timed(1, step)

        def warm() -> None:
            publish()
            for number in (0, 1):  # the second with an adapter's graphs
                our_step(work.warm_up(), 2 - number)
                their_step(work.warm_up(), 0)
            for seconds in phases.values():
                seconds.clear()

        return Contest(
            ours=partial(our_step, work),
            theirs=partial(their_step, work),
            warm_up=warm,
            settings={**work.describe(), "phases": phases},
        )

    return _case(name, "trl", "steps/s", f"{size}-{dtype}", make)
