"""Where actors go: whether a run's roles fit on the nodes, and one placement group a worker.

Deciding is pure: `plan` takes what roles ask and what nodes have. Ray's placement groups wait for ever and cannot grow,
so a worker gets one of its own, with a time-out and an explanation.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .config import Resources
from .errors import DoesNotFit

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Demand:
    """A role asks for `count` actors of `cpus` and `gpus` each."""

    role: str
    count: int
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node has."""

    node: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """Actor `index` of `role` fits on `node`."""

    role: str
    index: int
    node: str


@dataclass(slots=True)
class _Node:
    name: str
    cpus: float
    gpus: float
    taken: list[Assignment] = field(default_factory=list)

    def fits(self, demand: Demand) -> bool:
        return self.cpus + _EPSILON >= demand.cpus and self.gpus + _EPSILON >= demand.gpus


def plan(demands: Sequence[Demand], nodes: Sequence[Offer]) -> list[Assignment]:
    """Find a node for every actor, or raise `DoesNotFit` with what was asked, what there is and the mend.

    The largest actors choose first (GPUs before CPUs), each the fullest node that still has room, so that whole nodes
    stay free. Like Ray's own scheduler this is greedy: it can miss a fit that an exhaustive search would find.
    """
    free = [_Node(n.node, n.cpus, n.gpus) for n in nodes]
    placed: list[Assignment] = []
    for demand in sorted(demands, key=lambda d: (d.gpus, d.cpus), reverse=True):
        for index in range(demand.count):
            node = min((n for n in free if n.fits(demand)), key=lambda n: (n.gpus, n.cpus), default=None)
            if node is None:
                raise DoesNotFit(_refusal(demand, index, demands, nodes))
            node.cpus -= demand.cpus
            node.gpus -= demand.gpus
            placed.append(Assignment(demand.role, index, node.name))
    return placed


def _refusal(demand: Demand, index: int, demands: Sequence[Demand], nodes: Sequence[Offer]) -> str:
    asked = ", ".join(f"{d.role} {d.count} × {amount(d.cpus, d.gpus)}" for d in demands)
    total = amount(sum(d.count * d.cpus for d in demands), sum(d.count * d.gpus for d in demands))
    have = "; ".join(f"{n.node} has {amount(n.cpus, n.gpus)}" for n in nodes) or "there is no node"
    which = f"{demand.role} {index + 1} of {demand.count}"
    largest = any(n.cpus + _EPSILON >= demand.cpus and n.gpus + _EPSILON >= demand.gpus for n in nodes)
    mend = (
        f"ask for fewer {demand.role} actors or smaller resources, add nodes, or for a local Ray raise cluster.cpus"
        if largest
        else f"no node is large enough for one {demand.role} actor: lower its resources or add a larger node"
    )
    return f"{which} does not fit; asked: {asked} ({total} in all); cluster: {have}. {mend}"


def amount(cpus: float, gpus: float) -> str:
    """`2 CPU`, `0.5 CPU + 1 GPU`."""
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def offers() -> list[Offer]:
    """What the living nodes of the connected cluster have in all, the head first."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    alive.sort(key=lambda n: ("node:__internal_head__" not in n["Resources"], n["NodeManagerAddress"], n["NodeID"]))
    return [Offer(_name(n), n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in alive]


def free_offers() -> list[Offer]:
    """What the living nodes have left now."""
    import ray
    from ray._private.state import available_resources_per_node

    left = available_resources_per_node()
    alive = [n for n in ray.nodes() if n["Alive"]]
    have = [(_name(n), left.get(n["NodeID"], {})) for n in alive]
    return [Offer(name, free.get("CPU", 0.0), free.get("GPU", 0.0)) for name, free in have]


def _name(node: dict[str, object]) -> str:
    return f"{node['NodeManagerAddress']}/{str(node['NodeID'])[:6]}"


def place(
    role: str, resources: Resources, timeout: float, *, cancelled: Callable[[], bool] = lambda: False
) -> "PlacementGroup":
    """Reserve the resources of one worker; give its actor `PlacementGroupSchedulingStrategy(group)`.

    Raises `DoesNotFit` after `timeout` seconds, or once `cancelled` says so, with what is missing; nothing stays
    reserved then.
    """
    group = reserve(role, resources)
    began = time.monotonic()
    try:
        while (left := began + timeout - time.monotonic()) > 0 and not cancelled():
            if _ready(group, min(left, 0.5)):
                return group
    except BaseException:
        release(group)
        raise
    release(group)
    raise DoesNotFit(f"{missing(role, resources, timeout)}. Free some or add a node")


def reserve(role: str, resources: Resources) -> "PlacementGroup":
    """Ask for the resources of one worker without waiting for them; meanwhile Ray's autoscaler sees the wish."""
    from ray.util.placement_group import placement_group

    name = f"{role}-{uuid.uuid4().hex[:8]}"  # Ray refuses a name that is in use
    bundle = {name: n for name, n in (("CPU", resources.cpus), ("GPU", resources.gpus)) if n > 0}
    return placement_group([bundle or {"CPU": 0.001}], name=name)


def missing(role: str, resources: Resources, seconds: float) -> str:
    """What a role asked for without getting it for so long, and what the nodes have left."""
    asked = amount(resources.cpus, resources.gpus)
    return f"{role} asked for {asked} and got no place within {seconds:g} s: {free()}"


def free() -> str:
    """What each node has left now, in words."""
    return "; ".join(f"{n.node} has {amount(n.cpus, n.gpus)} free" for n in free_offers()) or "there is no node"


def node_of(group: "PlacementGroup") -> str | None:
    """The node on which a reservation lies, named as in `offers`; None while it has no place."""
    import ray
    from ray.util.placement_group import placement_group_table

    facts = placement_group_table(group)
    if facts.get("state") != "CREATED":
        return None
    (node,) = facts["bundles_to_node_id"].values()
    return next((_name(n) for n in ray.nodes() if n["NodeID"] == node), node)


def _ready(group: "PlacementGroup", seconds: float) -> bool:
    from ray.exceptions import GetTimeoutError

    try:
        return group.wait(seconds)
    except GetTimeoutError:
        return False


def release(group: "PlacementGroup") -> None:
    """Give a reservation back; an actor that still runs in it is ended."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)
