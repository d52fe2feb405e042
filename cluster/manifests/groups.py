"""The kinds of nodes a cluster is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning import Offer


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes of one kind: what each has, and how many there are at least and at most."""

    name: str
    cpus: int
    gpus: int = 0
    memory_gb: int
    least: int
    most: int


def offers(groups: Sequence[Group]) -> list[Offer]:
    """What the groups have at their largest, for the planner; the head has nothing for actors."""
    return [Offer(f"{g.name}-{n}", g.cpus, g.gpus, labels=None) for g in groups for n in range(g.most)]
