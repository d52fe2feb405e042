"""What nodes have, and one placement group a worker on the nodes where it may stand.

Ray's placement groups wait for ever and cannot grow, so a worker gets one of its own, with a time-out and an
explanation. Where actors should go is decided in `planning`.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import Resources
from .errors import DoesNotFit
from .planning import Offer, amount

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


_TELL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """On which nodes an actor may stand, named as in `offers`: on all, on `only` these, or on all but `never` these."""

    only: frozenset[str] | None = None
    never: frozenset[str] = frozenset()

    def allow(self, node: str) -> bool:
        """Whether a node is within them."""
        return (self.only is None or node in self.only) and node not in self.never

    def __str__(self) -> str:
        if self.only is not None:
            return f" on {' or '.join(sorted(self.only - self.never)) or 'no node'}"
        return f" off {' and '.join(sorted(self.never))}" if self.never else ""


ANYWHERE = Bounds()


def offers() -> list[Offer]:
    """What the living nodes of the connected cluster have in all, the head first."""
    import ray

    alive = [n for n in ray.nodes() if n["Alive"]]
    alive.sort(key=lambda n: ("node:__internal_head__" not in n["Resources"], n["NodeManagerAddress"], n["NodeID"]))
    return [_offer(n, n["Resources"]) for n in alive]


def free_offers() -> list[Offer]:
    """What the living nodes have left now."""
    import ray
    from ray._private.state import available_resources_per_node

    left = available_resources_per_node()
    alive = [n for n in ray.nodes() if n["Alive"]]
    return [_offer(n, left.get(n["NodeID"], {})) for n in alive]


def _offer(node: dict[str, Any], has: dict[str, float]) -> Offer:
    return Offer(_name(node), has.get("CPU", 0.0), has.get("GPU", 0.0), node.get("Labels") or {})


def _name(node: dict[str, object]) -> str:
    return f"{node['NodeManagerAddress']}/{str(node['NodeID'])[-6:]}"


def place(
    role: str,
    resources: Resources,
    timeout: float,
    *,
    bounds: Callable[[], Bounds] = lambda: ANYWHERE,
    cancelled: Callable[[], bool] = lambda: False,
) -> "PlacementGroup":
    """Reserve the resources of one worker; give its actor `PlacementGroupSchedulingStrategy(group)`.

    It lies within the `bounds`, also where they change meanwhile. Raises `DoesNotFit` after `timeout` seconds, or once
    `cancelled` says so, with what is missing; nothing stays reserved then.
    """
    within = bounds()
    group = reserve(role, resources, within)
    began = time.monotonic()
    try:
        while (left := began + timeout - time.monotonic()) > 0 and not cancelled():
            if within != (within := bounds()):
                release(group)
                group = reserve(role, resources, within)
            if _ready(group, min(left, 0.5)):
                return group
    except BaseException:
        release(group)
        raise
    release(group)
    raise DoesNotFit(f"{missing(role, resources, timeout, within)}. Free some or add a node")


def reserve(role: str, resources: Resources, bounds: Bounds = ANYWHERE) -> "PlacementGroup":
    """Ask for the resources of one worker without waiting for them; meanwhile Ray's autoscaler sees the wish."""
    from ray.util.placement_group import placement_group

    name = f"{role}-{uuid.uuid4().hex[:8]}"  # Ray refuses a name that is in use
    bundle = {name: n for name, n in (("CPU", resources.cpus), ("GPU", resources.gpus)) if n > 0}
    return placement_group([bundle or {"CPU": 0.001}], name=name, bundle_label_selector=_selector(resources, bounds))


@contextmanager
def wished(asked: Sequence[Resources]) -> Iterator[Callable[[], None]]:
    """Gives what tells Ray's autoscaler that the cluster should hold all of these at once, whether or not anybody has
    asked for a place yet; forgotten when the block ends. The last who tells it counts, of all runs of a cluster."""
    from ray.autoscaler.sdk import request_resources

    told = 0.0

    def tell() -> None:
        nonlocal told
        if told and time.monotonic() - told < _TELL_SECONDS:
            return
        told = time.monotonic()
        some = [r for r in asked if r.cpus or r.gpus]
        bundles = [{name: n for name, n in (("CPU", r.cpus), ("GPU", r.gpus)) if n > 0} for r in some]
        request_resources(bundles=bundles, bundle_label_selectors=[r.labels for r in some])

    try:
        yield tell
    finally:
        if told:
            request_resources(bundles=[])


def _selector(resources: Resources, bounds: Bounds) -> Any:
    """Labels and bounds as Ray takes them, these by the label with its id that every node has; None for neither, which
    Ray's own type forgets."""
    import ray

    if bounds == ANYWHERE:
        return [resources.labels] if resources.labels else None
    ids = {_name(n): str(n["NodeID"]) for n in ray.nodes()}  # of dead ones too: who is bound to one waits
    which = bounds.never if bounds.only is None else bounds.only - bounds.never
    listed = ",".join(sorted(ids[name] for name in which if name in ids)) or "none"
    return [resources.labels | {"ray.io/node-id": f"{'!' if bounds.only is None else ''}in({listed})"}]


def missing(role: str, resources: Resources, seconds: float, bounds: Bounds = ANYWHERE) -> str:
    """What a role asked for without getting it for so long, and what the nodes have left."""
    asked = amount(resources.cpus, resources.gpus)
    return f"{role} asked for {asked}{bounds} and got no place within {seconds:g} s: {free()}"


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
