"""Whether a run's roles fit on the nodes, and on which node each actor then goes. Pure: it knows no Ray."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import DoesNotFit

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Demand:
    """A role asks for `count` actors of `cpus` and `gpus` each."""

    role: str
    count: int
    cpus: float = 1.0
    gpus: float = 0.0
    colocate_with: str | None = None
    """All of them on the node of that role, of its first actor where it has several."""
    split_from: tuple[str, ...] = ()
    """None of them on a node that has an actor of these roles."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """On nodes with these labels alone: each a value, `!value`, `in(value, …)` or `!in(value, …)`."""

    @property
    def each(self) -> str:
        """What one of them asks for: `0.5 CPU colocated with policy`."""
        together = f" colocated with {self.colocate_with}" if self.colocate_with else ""
        apart = f" split from {', '.join(self.split_from)}" if self.split_from else ""
        labels = f" on nodes with {_listed(self.labels)}" if self.labels else ""
        return f"{amount(self.cpus, self.gpus)}{together}{apart}{labels}"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node has."""

    node: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] | None = field(default_factory=dict)
    """None where it gets whatever labels are asked for."""

    def has(self, labels: Mapping[str, str]) -> bool:
        """Whether it has such labels."""
        return self.labels is None or all(_selects(wanted, self.labels.get(key)) for key, wanted in labels.items())


def _selects(wanted: str, value: str | None) -> bool:
    """Whether a label's value is one that a selector of Ray's takes; a label that is missing is no value at all."""
    positive = wanted.removeprefix("!")
    listed = positive.removeprefix("in(").removesuffix(")").split(",") if positive.startswith("in(") else [positive]
    return (value in [one.strip() for one in listed]) != wanted.startswith("!")


@dataclass(frozen=True, slots=True)
class Assignment:
    """Actor `index` of `role` fits on `node`."""

    role: str
    index: int
    node: str


@dataclass(frozen=True, slots=True)
class _Pack:
    """Actors that go on one node together."""

    actors: tuple[tuple[Demand, int], ...]
    node: str | None = None
    """Where they must go, since one that they follow or that follows them is there."""

    @property
    def head(self) -> Demand:
        return self.actors[0][0]

    @property
    def gpus(self) -> float:
        return sum(d.gpus for d, _ in self.actors)

    @property
    def cpus(self) -> float:
        return sum(d.cpus for d, _ in self.actors)

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(d.role for d, _ in self.actors)


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    cpus: float
    gpus: tuple[float, ...]
    """What is left of each device."""
    roles: frozenset[str] = frozenset()
    """Who is there."""
    offer: Offer | None = None
    """What it was at first."""

    def has_labels_for(self, pack: _Pack) -> bool:
        """Whether it has the labels that everybody in the pack asks for."""
        return self.offer is None or all(self.offer.has(d.labels) for d, _ in pack.actors)

    def taking(self, pack: _Pack) -> "_Node | None":
        """The node with the pack on it, where there is room. As in Ray, parts of a GPU lie on one device."""
        cpus, gpus = self.cpus - pack.cpus, list(self.gpus)
        if cpus < -_EPSILON:
            return None
        for share in sorted((d.gpus for d, _ in pack.actors if d.gpus), reverse=True):
            size = min(share, 1.0)
            for _ in range(max(1, round(share))):
                device = min((g for g in gpus if g + _EPSILON >= size), default=None)
                if device is None:
                    return None
                gpus[gpus.index(device)] = device - size
        return _Node(self.name, cpus, tuple(gpus), self.roles | pack.roles, self.offer)


_State = tuple[dict[str, _Node], list[Assignment]]


@dataclass(frozen=True, slots=True)
class _Refused:
    pack: _Pack


def plan(demands: Sequence[Demand], nodes: Sequence[Offer], standing: Sequence[Assignment] = ()) -> list[Assignment]:
    """Find a node for every actor, or raise `DoesNotFit` with what was asked, what there is and the mend.

    Those who are `standing` stay: what they hold is not among the offers, and the others' wishes count with them.

    Who stands together counts as one. Roles that others name choose first, then those that are split, then the largest
    (GPUs before all), each the fullest node that still has room, so that whole nodes stay free. For the first actor of
    a role that others name every node is tried; beyond that this is greedy, as Ray's own scheduler, and can miss a fit
    that an exhaustive search would find.
    """
    split = {(d.role, other) for d in demands for other in d.split_from}
    apart = {d.role: {b for a, b in split if a == d.role} | {a for a, b in split if b == d.role} for d in demands}
    there = {n.node: _Node(n.node, n.cpus, _devices(n.gpus), _roles_on(n.node, standing), n) for n in nodes}
    heads, others = _packs(demands, [s for s in standing if s.node in there])
    found = _search(heads, others, (there, []), apart)
    if isinstance(found, _Refused):
        raise DoesNotFit(_refusal(found.pack, demands, nodes, apart))
    return found[1]


def _devices(gpus: float) -> tuple[float, ...]:
    """The devices of a node: whole ones, and what is left of one that is shared."""
    whole, part = divmod(gpus + _EPSILON, 1)
    return (1.0,) * int(whole) + ((part,) if part > 2 * _EPSILON else ())


def _roles_on(node: str, standing: Iterable[Assignment]) -> frozenset[str]:
    return frozenset(s.role for s in standing if s.node == node)


def _packs(demands: Sequence[Demand], standing: Sequence[Assignment]) -> tuple[list[_Pack], list[_Pack]]:
    """The packs of the first actors of roles that others name, and all others, each in the order of choice."""
    by_role = {d.role: d for d in demands}
    at = {(s.role, s.index): s.node for s in standing}
    named = {role for d in demands for role in (d.colocate_with, *d.split_from) if role}
    missing = [(d, i) for d in demands for i in range(d.count) if (d.role, i) not in at]

    def host(role: str) -> str:
        other = by_role[role].colocate_with
        return host(other) if other else role

    def key(demand: Demand, index: int) -> tuple[str, int]:
        return (host(demand.role), 0) if demand.colocate_with else (demand.role, index)

    together: dict[tuple[str, int], list[tuple[Demand, int]]] = {}
    for demand, index in missing:
        together.setdefault(key(demand, index), []).append((demand, index))
    where = {key(by_role[role], index): node for (role, index), node in at.items() if role in by_role}
    where |= {place: node for place, node in at.items() if place[0] in by_role}  # whom they follow has the last word

    packs = [_Pack(tuple(actors), where.get(place)) for place, actors in together.items()]
    first = [p for p in packs if p.roles & named and any(i == 0 for _, i in p.actors)]
    rest = [p for p in packs if p not in first]
    split = {role for d in demands if d.split_from for role in (d.role, *d.split_from)}
    first.sort(key=lambda p: (p.gpus, p.cpus), reverse=True)
    rest.sort(key=lambda p: (p.gpus, bool(p.roles & split), p.cpus), reverse=True)
    return first, rest


def _search(heads: list[_Pack], others: list[_Pack], state: _State, apart: dict[str, set[str]]) -> "_State | _Refused":
    """Every node for each of the heads, one after the other, and for the others the best."""
    if not heads:
        for pack in others:
            taken = next(_choices(pack, state, apart), None)
            if taken is None:
                return _Refused(pack)
            state = taken
        return state
    refused = _Refused(heads[0])
    for taken in _choices(heads[0], state, apart):
        found = _search(heads[1:], others, taken, apart)
        if not isinstance(found, _Refused):
            return found
        refused = found if refused.pack is heads[0] else refused  # why the best choice fails tells most
    return refused


def _choices(pack: _Pack, state: _State, apart: dict[str, set[str]]) -> Iterator[_State]:
    """The state with the pack on each node that may take it, the best first; of equal nodes one."""
    nodes, placed = state
    shunned = frozenset(other for role in pack.roles for other in apart.get(role, ()))
    able = [n for n in nodes.values() if pack.node in (None, n.name) and not n.roles & shunned]
    able = [n for n in able if n.has_labels_for(pack)]
    able.sort(key=lambda n: (bool(shunned) and not n.roles & pack.roles, sum(n.gpus), n.cpus))
    seen = set()
    for node in able:
        after = node.taking(pack)
        if after is None or (like := (node.cpus, node.gpus, node.roles, _labels_of(node))) in seen:
            continue
        seen.add(like)
        yield nodes | {node.name: after}, [*placed, *(Assignment(d.role, i, node.name) for d, i in pack.actors)]


def _labels_of(node: _Node) -> frozenset[tuple[str, str]]:
    return frozenset((node.offer.labels or {}).items()) if node.offer else frozenset()


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in labels.items())


def _refusal(pack: _Pack, demands: Sequence[Demand], nodes: Sequence[Offer], apart: dict[str, set[str]]) -> str:
    asked = ", ".join(f"{d.role} {d.count} × {d.each}" for d in demands)
    total = amount(sum(d.count * d.cpus for d in demands), sum(d.count * d.gpus for d in demands))
    have = "; ".join(f"{n.node} has {amount(n.cpus, n.gpus)}" for n in nodes) or "there is no node"
    mend = _mend(pack, nodes, sorted(other for role in pack.roles for other in apart.get(role, ())))
    return f"{_name(pack)} does not fit; asked: {asked} ({total} in all); cluster: {have}. {mend}"


def _name(pack: _Pack) -> str:
    """`rollout 3 of 4`, or of a pack `policy with reference, reward`."""
    (head, index), *others = pack.actors
    if not others:
        return f"{head.role} {index + 1} of {head.count}"
    return f"{head.role} with {', '.join(_counted(d.role for d, _ in others))}"


def _counted(roles: Iterable[str]) -> list[str]:
    listed = list(roles)
    return [f"{listed.count(r)} × {r}" if listed.count(r) > 1 else r for r in dict.fromkeys(listed)]


def _mend(pack: _Pack, nodes: Sequence[Offer], shunned: Sequence[str]) -> str:
    role = pack.head.role
    labels = {key: value for d, _ in pack.actors for key, value in d.labels.items()}
    fitting = [n for n in nodes if n.has(labels)]
    if not fitting:
        return (
            f"no node has the labels that {role} asks for ({_listed(labels)}): start some with `ray start "
            "--labels`, or change the role's labels"
        )
    large = any(_Node(n.node, n.cpus, _devices(n.gpus)).taking(pack) for n in fitting)
    if not large and len(pack.actors) > 1:
        return (
            f"colocated they need a node with {amount(pack.cpus, pack.gpus)} and none is large enough: lower their "
            "resources, leave out a colocate_with, or add a larger node"
        )
    if not large:
        return f"no node is large enough for one {role} actor: lower its resources or add a larger node"
    if shunned and len(nodes) == 1:
        return (
            f"split_from keeps {role} off the nodes of {', '.join(shunned)} and there is one node only: leave it out, "
            "or run on a cluster of several nodes"
        )
    apart = f"off the nodes of {', '.join(shunned)}: leave split_from out, " if shunned else ""
    return f"{apart}ask for fewer {role} actors or smaller resources, add nodes, or for a local Ray raise cluster.cpus"


def amount(cpus: float, gpus: float) -> str:
    """`2 CPU`, `0.5 CPU + 1 GPU`."""
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
