"""What nodes can hold and compute, and whether a plan fits there."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cluster.errors import DoesNotFit, InputError
from ...cluster.planning import Offer
from .stages import RolePlan, StagePlan

_CARDS = {
    "V100": (16, 125), "T4": (16, 65), "L4": (24, 121), "L40S": (48, 362), "A10G": (24, 125), "A100-40G": (40, 312),
    "A100": (40, 312), "A100-80G": (80, 312), "H100": (80, 989), "H200": (141, 989), "B200": (180, 2250),
}  # fmt: skip
"""By Ray's `accelerator_type`: memory in GB and dense bf16 TFLOP/s, of NVIDIA's data sheets."""
_UTILISATION = 0.4
"""Of a GPU's peak, in training (PaLM 2204.02311 reports 0.46, Llama 3 2407.21783 0.38 to 0.43)."""
_CPU_UTILISATION = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one node has; None where it is not known."""

    node: str
    memory: float | None
    gpus: float = 0.0
    gpu_memory: float | None = None
    gpu_flops: float | None = None


def this_machine() -> Room:
    """Memory of this machine, or of the container that we are in, and of its GPUs."""
    import psutil
    import torch

    memory = float(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, float(text))
    count = torch.cuda.device_count()
    if not count:
        return Room(node="this machine", memory=memory)
    known = next((c for name, c in _CARDS.items() if name in torch.cuda.get_device_name(0)), None)
    held = float(torch.cuda.get_device_properties(0).total_memory)
    return Room(
        node="this machine",
        memory=memory,
        gpus=count,
        gpu_memory=held,
        gpu_flops=known[1] * 1e12 * _UTILISATION if known else None,
    )


def rooms_of_cluster() -> list[Room]:
    """The living nodes of the connected cluster; GPUs are known by their `accelerator_type`."""
    import ray

    return [_room(n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]]


def _room(node: str, resources: dict[str, float]) -> Room:
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    known = _CARDS.get(kinds[0]) if kinds else None
    return Room(
        node=node,
        memory=resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0) or None,
        gpus=resources.get("GPU", 0.0),
        gpu_memory=known[0] * 1e9 if known else None,
        gpu_flops=known[1] * 1e12 * _UTILISATION if known else None,
    )


_NODES = re.compile(r"(\d+)x(\d+)(?:,(\d+)gb)?(?:,(\d+)x([\w-]+))?")


def described(text: str) -> tuple[list[Offer], list[Room]]:
    """Nodes that are not there yet, from words: `8x128,1024gb,8xH100` is eight of 128 CPUs, 1,024 GB and 8 H100 each.

    Memory and GPUs may be left out; they have whatever labels a recipe asks for. Raises `InputError`.
    """
    found = _NODES.fullmatch(text.replace(" ", ""))
    card = _CARDS.get(found[5]) if found and found[5] else None
    if found is None or (found[5] and card is None):
        raise InputError(
            f"--node {text!r}: write COUNTxCPUS,MEMORYgb,GPUSxCARD, such as 8x128,1024gb,8xH100; cards are "
            f"{', '.join(_CARDS)}"
        )
    count, cpus, gpus = int(found[1]), int(found[2]), int(found[4] or 0)
    offers = [Offer(f"{text} #{n + 1}", cpus, gpus, labels=None) for n in range(count)]
    rooms = [
        Room(
            node=offer.node,
            memory=float(found[3]) * 1e9 if found[3] else None,
            gpus=gpus,
            gpu_memory=card[0] * 1e9 if card else None,
            gpu_flops=card[1] * 1e12 * _UTILISATION if card else None,
        )
        for offer in offers
    ]
    return offers, rooms


def flops_per_second(stage: StagePlan, rooms: Sequence[Room]) -> float | None:
    """What one device of the role that learns computes: a GPU by its name, a CPU core by a product done now."""
    if stage.trainer.gpus:
        return next((room.gpu_flops for room in rooms if room.gpus), None)
    return _measured_core()


def _measured_core(size: int = 768, repetitions: int = 3) -> float:
    import torch

    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(repetitions):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best * _CPU_UTILISATION


def require_room(stages: Sequence[StagePlan], rooms: Sequence[Room]) -> None:
    """Raise `DoesNotFit` for the first stage whose roles, or all together, need more memory than there is."""
    for stage in stages:
        for role in stage.roles:
            _require_device(stage, role, rooms)
        for gpu in (True, False):
            _require_sum(stage, rooms, gpu)


def _require_device(stage: StagePlan, role: RolePlan, rooms: Sequence[Room]) -> None:
    kind = "GPU" if role.gpus else "node"
    found = [_memory(room, bool(role.gpus)) for room in rooms if not role.gpus or room.gpus]
    known = [memory for memory in found if memory is not None]
    if len(known) < len(found) or not known or role.each.total <= max(known):
        return
    raise DoesNotFit(
        f"stage {stage.stage}: {role.role} needs {role.each.total / 1e9:,.1f} GB on each of its {role.devices} "
        f"devices ({_largest(role)}), and the largest {kind} has {max(known) / 1e9:,.1f} GB: {_mend(role)}"
    )


def _require_sum(stage: StagePlan, rooms: Sequence[Room], gpu: bool) -> None:
    roles = [role for role in stage.roles if bool(role.gpus) == gpu]
    held = [_memory(room, gpu) for room in rooms if not gpu or room.gpus]
    if not roles or not held or any(memory is None for memory in held):
        return
    counts = [room.gpus for room in rooms if room.gpus] if gpu else [1.0] * len(held)
    have = sum((memory or 0.0) * count for memory, count in zip(held, counts, strict=True))
    need = sum(role.devices * role.each.total for role in roles)
    if need > have:
        listed = ", ".join(f"{r.role} {r.devices} × {r.each.total / 1e9:,.1f} GB" for r in roles)
        raise DoesNotFit(
            f"stage {stage.stage}: {listed} are {need / 1e9:,.1f} GB together, and "
            f"{'all GPUs' if gpu else 'the nodes'} have {have / 1e9:,.1f} GB: take fewer workers or add nodes"
        )


def _memory(room: Room, gpu: bool) -> float | None:
    return room.gpu_memory if gpu else room.memory


def _largest(role: RolePlan) -> str:
    items = sorted(role.each.gigabytes().items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {size:,.1f}" for name, size in items[:3])


def _mend(role: RolePlan) -> str:
    each = role.each
    if each.kv_cache > each.state:
        return "lower rollout.slots or rollout.sampling.max_tokens"
    if each.activations + each.logits > each.state:
        return "lower micro_batch_size (micro_batch_tokens online) or max_length"
    if each.optimizer > each.weights:
        return "give the stage an adapter, or shard it over more ranks"
    return "quantize the adapter's base (adapter.quantize: nf4), shard it over more ranks, or take larger devices"
