"""Where the actors of an online stage stand, and so where those to come may, after the wishes of their roles. Pure."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from ..cluster.config import Resources
from ..cluster.placement import ANYWHERE, Bounds
from ..cluster.planning import Assignment, Demand, Offer, plan

_ROLLOUT = "rollout"


class Places:
    """The nodes of a stage's actors, which its roles and its pool share.

    In a stage without wishes everybody goes where Ray has room, and nothing is kept here. In one with wishes the roles
    go where the plan has them, so that what was checked is what comes; rollout workers, which come and go, to any node
    that the wishes leave them. Actors go by their names, with or without what stands before a `/`: `policy-0`,
    `reference`, `run/grpo/rollout-3`.
    """

    def __init__(self, demands: Sequence[Demand] = (), *, least: int = 1) -> None:
        """`demands` are all roles' at the start, and `least` the fewest rollout workers that will do."""
        self._roles = [d for d in demands if d.role != _ROLLOUT]
        self._rollout = next((d for d in demands if d.role == _ROLLOUT), Demand(_ROLLOUT, 0))
        self._least = least
        self._nodes: dict[_Actor, str] = {}
        """Actor of a role → its node, or, until it has another, that where it was lost."""
        self._workers: dict[str, str] = {}
        """Rollout worker → its node."""
        self.wished = any(d.colocate_with or d.split_from for d in demands)

    def asked(self) -> list[Resources]:
        """What each actor reserves: of all roles, and of the rollout workers of the start."""
        each = [d for d in (*self._roles, self._rollout) for _ in range(d.count)]
        return [Resources(cpus=d.cpus, gpus=d.gpus, labels=dict(d.labels)) for d in each]

    def stands(self, actor: str, node: str) -> None:
        """A rollout worker has its place."""
        self._workers[actor] = node

    def left(self, actor: str) -> None:
        """A rollout worker is no more."""
        self._workers.pop(actor, None)

    def on(self, nodes: Iterable[Offer], actor: str) -> bool:
        """Whether the node of a role's actor is among these."""
        return self._nodes.get(_actor(actor)) in {n.node for n in nodes}

    def settled(self, there: Iterable[str], nodes: Iterable[Offer]) -> bool:
        """Whether all actors of roles that are not there have a node to go to among these."""
        alive = {n.node for n in nodes}
        return all(self._nodes.get(place) in alive for place in self._missing(there))

    def bounds(self, actor: str) -> Bounds:
        """Where an actor may stand now: one of a role where `choose` has put it."""
        if not self.wished:
            return ANYWHERE
        if (place := _actor(actor))[0] != _ROLLOUT:
            return Bounds(only=frozenset({self._nodes[place]}))
        never = frozenset(node for (role, _), node in self._nodes.items() if role in self._rollout.split_from)
        if self._rollout.colocate_with is None:
            return Bounds(never=never)
        return Bounds(only=frozenset({self._nodes[self._rollout.colocate_with, 0]}), never=never)

    def choose(self, there: Collection[str], nodes: Sequence[Offer], *, moving: bool = False) -> None:
        """Choose nodes, of which is given what they have left, for all actors of roles but those who are there.

        These stay, and there is room for the rollout workers of the start. With `moving` workers need not stay: they
        will follow, and only the fewest that will do get room. Raises `DoesNotFit`.
        """
        missing = self._missing(there)
        if not missing:
            return
        count = max(0, (self._least if moving else self._rollout.count) - len(self._workers))
        standing = [Assignment(*place, node) for place, node in self._nodes.items() if place not in missing]
        if not moving:
            standing += [Assignment(_ROLLOUT, count + i, node) for i, node in enumerate(self._workers.values())]
        chosen = plan([*self._roles, replace(self._rollout, count=count)], nodes, standing)
        self._nodes |= {(a.role, a.index): a.node for a in chosen if (a.role, a.index) in missing}

    def _missing(self, there: Iterable[str]) -> "set[_Actor]":
        return {(d.role, i) for d in self._roles for i in range(d.count)} - {_actor(name) for name in there}


_Actor = tuple[str, int]


def _actor(name: str) -> _Actor:
    """`policy-0` is actor 0 of the policy; `reference` the only one there is."""
    role, _, index = name.rpartition("/")[2].partition("-")
    return role, int(index or 0)
