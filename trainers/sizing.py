"""The groups of nodes that a recipe needs: GPUs for those who learn, workers that come and go, CPUs for the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster.errors import InputError
from ..cluster.manifests.groups import Group, offers
from ..cluster.planning import Demand
from .config import RunConfig
from .pipeline import check_placement, demands
from .stages import OnlineStage

_ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one node of a group may have at most, and how much memory comes with a CPU."""

    gpus: int = 8
    cpus: int = 16
    memory_per_cpu: int = 4
    """In GiB."""


def groups_of(config: RunConfig, shape: Shape | None = None) -> list[Group]:
    """Groups that hold every stage of the recipe, one after the other, and then its service.

    Raises `DoesNotFit` for an actor that is larger than a node may be.
    """
    shape = shape or Shape()
    fixed = [[d for d in demands(stage) if d.role != _ROLLOUT] for stage in config.stages]
    fixed += [_service(config)] if config.serve else []
    gpu = [sum(math.ceil(d.gpus * d.count) for d in stage if d.gpus) for stage in fixed]
    made = []
    if most := max(gpu, default=0):
        made.append(_gpus(most, max(fixed, key=lambda s: sum(d.gpus * d.count for d in s)), shape))
    if cpus := max((math.ceil(sum(d.cpus * d.count for d in stage if not d.gpus)) for stage in fixed), default=0):
        made.append(_cpus(cpus, shape))
    made += _workers(config, shape)
    check_placement(_at_most(config), offers(made))
    return made


def _service(config: RunConfig) -> list[Demand]:
    assert config.serve, "only of a recipe that serves"
    each = config.serve.resources
    return [Demand("serve replica", config.serve.replicas.max, each.cpus, each.gpus)]


def _gpus(total: int, stage: Sequence[Demand], shape: Shape) -> Group:
    """Nodes of equal size for all actors of the stage that needs most GPUs."""
    each = min(shape.gpus, total)
    count = math.ceil(total / each)
    cpus = math.ceil(sum(d.cpus * d.count for d in stage if d.gpus) / count) + 1
    return Group(name="gpu", cpus=cpus, gpus=each, memory_gb=cpus * shape.memory_per_cpu, least=count, most=count)


def _cpus(total: int, shape: Shape) -> Group:
    each = min(shape.cpus, total)
    count = math.ceil(total / each)
    return Group(name="cpu", cpus=each, memory_gb=each * shape.memory_per_cpu, least=count, most=count)


def _workers(config: RunConfig, shape: Shape) -> list[Group]:
    """A node a rollout worker, as many as any stage may ask for; between stages none is needed."""
    online = [stage for stage in config.stages if isinstance(stage, OnlineStage)]
    if not online:
        return []
    largest = max(online, key=lambda s: (s.rollout.resources.gpus, s.rollout.resources.cpus)).rollout.resources
    cpus, gpus = max(1, math.ceil(largest.cpus)), math.ceil(largest.gpus)
    workers = [stage.rollout.workers for stage in online]
    return [
        Group(
            name=_ROLLOUT,
            cpus=cpus,
            gpus=gpus,
            memory_gb=max(cpus * shape.memory_per_cpu, 16 * gpus),
            least=0 if len(config.stages) > len(online) else min(w.min for w in workers),
            most=max(w.max for w in workers),
        )
    ]


def _at_most(config: RunConfig) -> RunConfig:
    """The recipe with as many rollout workers at its start as it may come to have."""
    stages = []
    for stage in config.stages:
        if isinstance(stage, OnlineStage):
            workers = stage.rollout.workers.model_copy(update={"start": stage.rollout.workers.max})
            stage = stage.model_copy(update={"rollout": stage.rollout.model_copy(update={"workers": workers})})
        stages.append(stage)
    return config.model_copy(update={"stages": stages})


def folder_files(paths: dict[str, str], limit: int = 900_000) -> dict[str, str]:
    """The texts of a recipe's folder, if a ConfigMap holds them (1 MiB with all its keys). Raises `InputError`."""
    total = sum(len(text.encode()) for text in paths.values())
    if total > limit:
        largest = max(paths, key=lambda path: len(paths[path]))
        raise InputError(
            f"the recipe's folder holds {total:,} bytes and a ConfigMap {limit:,}: the largest file is {largest}; put "
            "data on the storage and give its absolute path"
        )
    return paths
