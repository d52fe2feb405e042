"""What `raylign check --only plan` estimates over what is allocated, item by item.

Measured are bytes: of the tensors themselves for weights, gradients, optimizer and cache, and for activations with
logits the most that torch's allocator held at once in a forward and backward, beyond what it held before and ends with.
A ratio of 1 is exact; above, the plan asks for more than is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from .arena import Arena
from .measured import Case, Contest, Measured
from .models import save_model

RANK = 16
_ITEMS = ("weights", "gradients", "optimizer", "forward")
_SHAPE = {"1M": (8, 128), "25M": (4, 256)}
"""Rows and tokens of a forward."""
_BYTES_PER_MB = 1e6


@dataclass(frozen=True, slots=True)
class Method:
    """How a model is trained: adapter or all weights, in which type, with which loss."""

    name: str
    lora: bool = False
    quantize: str | None = None
    dtype: str = "float32"
    loss: str = "full"


METHODS = (
    Method("full"),
    Method("full-tiles", loss="tiles"),
    Method("lora", lora=True),
    Method("lora-tiles", lora=True, loss="tiles"),
    Method("lora-bf16-tiles", lora=True, dtype="bfloat16", loss="tiles"),
    Method("qlora-tiles", lora=True, quantize="nf4", loss="tiles"),
)


def cases() -> list[Case]:
    """Named like `25M-lora-tiles-forward`."""
    return [_case(size, method, item) for size in _SHAPE for method in METHODS for item in _ITEMS] + [
        _cache(size) for size in _SHAPE
    ]


def quick_cases() -> list[Case]:
    """All items of the smallest model's adapter."""
    return [_case("1M", METHODS[2], item) for item in _ITEMS]


def _case(size: str, method: Method, item: str) -> Case:
    make = partial(_contest, item, partial(_estimated, size, method), partial(_allocated, size, method))
    return Case(
        name=f"{size}-{method.name}-{item}", peer="torch's allocator", unit="MB", group=f"plan-{size}", make=make
    )


def _cache(size: str) -> Case:
    make = partial(_contest, "kv_cache", partial(_estimated_cache, size), partial(_allocated_cache, size))
    return Case(name=f"{size}-kv_cache", peer="the native engine", unit="MB", group=f"plan-{size}", make=make)


Bytes = Callable[[Path], dict[str, float]]


def _contest(item: str, estimated: Bytes, allocated: Bytes, arena: Arena) -> Contest:
    folder = arena.root / "of-plan"

    def megabytes(source: Bytes, _: int) -> Measured:
        return Measured(amount=source(folder)[item] / _BYTES_PER_MB, seconds=1.0, cpu_seconds=1.0)

    return Contest(
        ours=partial(megabytes, estimated),
        theirs=partial(megabytes, allocated),
        warm_up=lambda: None,
        settings={"item": item},
    )


def _model(size: str, root: Path) -> Path:
    folder = root / size
    return folder if folder.exists() else save_model(size, "fp32", folder)


@lru_cache
def _estimated(size: str, method: Method, root: Path) -> dict[str, float]:
    from raylign.trainers.plan.footprint import Lora, footprint
    from raylign.trainers.plan.memory import learner

    rows, tokens = _SHAPE[size]
    lora = Lora(r=RANK) if method.lora else None
    head = "full" if method.loss == "full" else "none"
    model = footprint(_model(size, root), dtype=method.dtype, lora=lora, rows=rows, tokens=tokens, head=head)
    each = learner(
        model,
        method.dtype,
        adapter=method.lora,
        quantized=bool(method.quantize),
        tokens=rows * tokens,
        logits="full" if head == "full" else "tiles",
    )
    return {
        "weights": each.weights,
        "gradients": each.gradients,
        "optimizer": each.optimizer,
        "forward": each.activations + each.logits,
    }


@lru_cache
def _allocated(size: str, method: Method, root: Path) -> dict[str, float]:
    import torch
    from raylign.trainers.adapters import open_model
    from raylign.trainers.stages import LoraConfig

    lora = LoraConfig.model_validate({"r": RANK, "quantize": method.quantize}) if method.lora else None
    model = open_model(_model(size, root), None, lora, seed=0, dtype=method.dtype)
    loss = _loss(model, method, *_SHAPE[size])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    loss().backward()
    optimizer.step()
    return {
        "weights": _weights(model),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer": sum(m.nbytes for s in optimizer.state.values() for m in s.values()),
        "forward": _peak(lambda: loss().backward()),
    }


def _weights(model: Any) -> float:
    """Bytes of all parameters, and of the scales that packed ones need."""
    held = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    return held


def _loss(model: Any, method: Method, rows: int, tokens: int) -> Callable[[], Any]:
    import torch
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.zeros(rows, tokens, dtype=torch.long)
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if method.loss == "full":
        return lambda: model(**given, use_cache=False).loss
    causal = model.get_base_model() if method.lora else model
    add_fused_lm_head(causal, outputs=("log_probs", "entropy", "is_top1"))
    return lambda: model(**given, fused_lm_head=True).loss


def _peak(work: Callable[[], Any]) -> float:
    """The most that torch's CPU allocator held at once, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: Any = profiler.profiler
    held = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(held):
        now += size
        most = max(most, now)
    return most


_SLOTS, _LENGTH = 16, 200


def _estimated_cache(size: str, root: Path) -> dict[str, float]:
    from raylign.trainers.plan.footprint import footprint
    from raylign.trainers.plan.memory import engine

    model = footprint(_model(size, root), dtype="float32")
    return {"kv_cache": engine(model, "float32", adapter=False, rows=_SLOTS + 1, length=_LENGTH).kv_cache}


def _allocated_cache(size: str, root: Path) -> dict[str, float]:
    from raylign.rollout.native.engine import NativeEngine

    engine = NativeEngine(_model(size, root), slots=_SLOTS, max_length=_LENGTH)
    cache: Any = engine._decoder._cache
    return {"kv_cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
