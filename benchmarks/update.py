"""The policy update on the same samples, real tokens per second and peak memory, against TRL's loss path.

Both compute log-probs, entropies, the loss of DAPO's aggregation, its gradient, clipping and AdamW in fp32 from the
same weights; before anything is measured their gradients are compared. A real token is one of a sample, its prompt's
among them; padding is none. `trl` is TRL without gradient checkpointing, in one micro-batch or in micro-batches of
eight, whichever the case says; `trl-defaults` is with checkpointing and eight, which are TRL's defaults.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from raylign.trainers.online.batch import TrainSample  # pyright: ignore[reportMissingImports]
from raylign.trainers.online.policy import Policy, PolicySpec  # pyright: ignore[reportMissingImports]
from raylign.trainers.stages import OnlineStage  # pyright: ignore[reportMissingImports]

from .arena import Arena
from .limits import layers_seconds, product_seconds
from .measured import Case, Contest, Measured, measure
from .memory import peak_megabytes
from .models import SHAPES, Shape
from .trl_peer import RANK, TrlUpdate, padded
from .workloads import Workload, lognormal_lengths

GROUP = 8
Kind = Literal["lora", "full"]
PEERS = ("trl", "trl-whole", "trl-defaults")
_ROWS_AND_MEDIAN = {
    ("1M", 32): (64, 64),
    ("1M", 512): (32, 64),
    ("25M", 32): (16, 32),
    ("25M", 512): (8, 32),
}
"""By size of the model and of the prompt; chosen so that ten pairs take minutes on one core."""
_TOLERANCE = 1e-5
_LIMIT_ROWS = 1024


def cases() -> list[Case]:
    """Named like `25M-lora-p32-vs-trl`."""
    return [
        _case(size, kind, workload(size, prompt, *_ROWS_AND_MEDIAN[size, prompt]), peer)
        for size in ("1M", "25M")
        for kind in ("lora", "full")
        for prompt in (32, 512)
        for peer in PEERS
    ]


def quick_cases() -> list[Case]:
    """One small case of each kind."""
    return [_case("1M", kind, workload("1M", 8, 16, 8), "trl") for kind in ("lora", "full")]


def workload(size: str, prompt: int, rows: int, median: int) -> Workload:
    """Groups of eight with a prompt each and lognormal completion lengths."""
    lengths = tuple(lognormal_lengths(rows, median).tolist())
    name = f"{size}-p{prompt}"
    return Workload(case=name, vocabulary=SHAPES[size].vocabulary, prompt=prompt, lengths=lengths, group=GROUP)


def samples_of(work: Workload, pair: int) -> list[TrainSample]:
    """The samples of a pair: random tokens and advantages."""
    random = np.random.default_rng(pair)
    return [
        TrainSample(
            prompt=np.array(prompt, np.int32),
            tokens=random.integers(3, work.vocabulary, length).astype(np.int32),
            behaviour=np.zeros(length, np.float32),
            advantages=np.full(length, random.normal(), np.float32),
        )
        for prompt, length in zip(work.prompts(pair), work.lengths, strict=True)
    ]


def policy(folder: Path, kind: Kind, dtype: str = "float32", gpus: float = 0) -> Policy:
    """Ours, with the settings that TRL has."""
    stage = OnlineStage.model_validate(
        {
            "data": {"path": "none"},
            "rewards": [{"type": "format", "pattern": "x"}],
            "adapter": {"r": RANK} if kind == "lora" else None,
            "learning_rate": 1e-6,
            "schedule": "constant",
            "warmup_steps": 0,
            "steps": 1000,
            "clip": {"dual": None},
            "mismatch": None,
            "policy": {"gpus": gpus},
        }
    )
    return Policy(PolicySpec(base=folder, base_digest="", adapter=None, stage=stage, seed=0, dtype=dtype))


def trl(folder: Path, kind: Kind, rows: int, peer: str) -> TrlUpdate:
    """Theirs."""
    micro_rows = rows if peer == "trl-whole" else GROUP
    return TrlUpdate(
        folder, adapter=kind == "lora", rows=rows, micro_rows=micro_rows, checkpointing=peer == "trl-defaults"
    )


def gradient_gap(ours: Policy, theirs: TrlUpdate, samples: list[TrainSample], device: str = "cpu") -> float:
    """The norm of the difference of both gradients, from the same weights, over the norm of theirs."""
    import torch

    ours._model.zero_grad()  # of the case before
    theirs.trainer.model.load_state_dict(ours._model.state_dict())
    ours._backward(samples, kl_coefficient=0.0)
    theirs.backward(padded(samples, device))
    gaps, norms = [], []
    for (name, mine), (other, parameter) in zip(
        ours._model.named_parameters(), theirs.trainer.model.named_parameters(), strict=True
    ):
        assert name == other
        if mine.grad is not None and parameter.grad is not None:
            gaps.append((mine.grad - parameter.grad).norm())
            norms.append(parameter.grad.norm())
    ours._model.zero_grad()
    theirs.trainer.model.zero_grad()
    return (torch.stack(gaps).norm() / torch.stack(norms).norm()).item()


def real_tokens(samples: list[TrainSample]) -> int:
    """Tokens of all samples, padding left out."""
    return sum(sample.length for sample in samples)


def tokens_per_second(shape: Shape, kind: Kind, work: Workload) -> float:
    """Real tokens per second when the matrix products run alone at full speed: a forward and the products of its
    backward (two with all weights, one with an adapter's), each prompt once, the head at completion tokens alone."""
    passes = 3 if kind == "full" else 2
    computed = work.prompts_computed * work.prompt + work.useful
    body = layers_seconds(_LIMIT_ROWS, shape, "fp32") / _LIMIT_ROWS
    head = product_seconds(_LIMIT_ROWS, shape.head, "fp32") / _LIMIT_ROWS
    real = len(work.lengths) * work.prompt + work.useful
    return real / (passes * (body * computed + head * work.useful))


def _case(size: str, kind: Kind, work: Workload, peer: str) -> Case:
    name = f"{size}-{kind}-p{work.prompt}-vs-{peer}"
    return Case(
        name=name,
        peer=peer,
        unit="real tokens/s",
        group=f"{size}-{kind}",
        make=partial(_contest, size, kind, replace(work, case=name), peer),
    )


def _contest(size: str, kind: Kind, work: Workload, peer: str, arena: Arena) -> Contest:
    folder, rows = arena.folder(size, "fp32"), len(work.lengths)
    ours: Policy = arena.get(policy, folder, kind)
    theirs: TrlUpdate = arena.get(trl, folder, kind, rows, peer)
    gap = gradient_gap(ours, theirs, samples_of(work, 0))
    if gap > _TOLERANCE:
        raise RuntimeError(f"{work.case}: the gradients differ by {gap:.1e} of their norm")

    def our_side(pair: int) -> Measured:
        samples = samples_of(work, pair)
        return measure(real_tokens(samples), lambda: ours.update(samples, 0, 0.0))

    def their_side(pair: int) -> Measured:
        samples = samples_of(work, pair)
        batch = padded(samples)  # which TRL does when it generates
        return measure(real_tokens(samples), lambda: theirs.update(batch))

    def warm_up() -> None:
        our_side(0)
        their_side(0)

    memory = {
        "ours": peak_megabytes(_our_peak, folder, kind, work),
        "theirs": peak_megabytes(_their_peak, folder, kind, work, peer),
    }
    return Contest(
        ours=our_side,
        theirs=their_side,
        warm_up=warm_up,
        limit=partial(tokens_per_second, SHAPES[size], kind, work),
        settings={**work.describe(), "gradient_gap": gap, "peak_megabytes": memory},
    )


def _our_peak(folder: Path, kind: Kind, work: Workload) -> Any:
    made, samples = policy(folder, kind), samples_of(work, 1)
    return lambda: made.update(samples, 0, 0.0)


def _their_peak(folder: Path, kind: Kind, work: Workload, peer: str) -> Any:
    made, batch = trl(folder, kind, len(work.lengths), peer), padded(samples_of(work, 1))
    return lambda: made.update(batch)
