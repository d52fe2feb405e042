"""Where the roles of an online stage wish to stand, and which wishes cannot be. Imports neither ray nor torch.

A role follows only roles that come before it in `ROLES`: those that hold what a run has learned choose first, and
rollout workers, which come and go, last. So no two roles wait for each other.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from ...cluster.config import RoleResources
from ...cluster.planning import Demand

ROLES = {
    "policy": "policy",
    "critic": "critic.resources",
    "reference": "reference",
    "reward": "scoring.resources",
    "rollout": "rollout.resources",
}
"""Where a recipe has each role's resources, in the order in which the roles get places."""

Roles = Mapping[str, tuple[int, RoleResources]]
"""How many actors a role has and what each reserves."""


def role_demands(roles: Roles) -> list[Demand]:
    """What the roles reserve and where, as the planner takes it."""
    return [
        Demand(role, count, r.cpus, r.gpus, colocate_with=r.colocate_with, split_from=r.split_from, labels=r.labels)
        for role, (count, r) in roles.items()
    ]


def refuse_wishes(roles: Roles) -> None:
    """Raise `ValueError` with the first wish of a role of the stage that no cluster could fulfil."""
    for role, (_, resources) in roles.items():
        for key, other in _wishes(resources):
            if reason := _reason(role, key, other, roles):
                raise ValueError(f"{ROLES[role]}.{key} {other!r}: {reason}")
        for other in resources.split_from:
            if (node := _host(role, roles)) == _host(other, roles):
                raise ValueError(
                    f"{ROLES[role]}.split_from {other!r}: colocate_with puts both on the node of {node}; "
                    "leave one of the two out"
                )


def _wishes(resources: RoleResources) -> Iterator[tuple[str, str]]:
    if resources.colocate_with is not None:
        yield "colocate_with", resources.colocate_with
    yield from (("split_from", other) for other in resources.split_from)


def _reason(role: str, key: str, other: str, roles: Roles) -> str | None:
    """Why a role cannot stand so relative to another."""
    order = list(ROLES)
    if other not in ROLES:
        near = get_close_matches(other, ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"roles are {', '.join(ROLES)}"
        return f"there is no such role: {hint}"
    if other == role:
        return f"that is the role itself; name another, such as {next(r for r in roles if r != role)}"
    if other not in roles:
        return f"this stage has no {other}: it has {', '.join(roles)}"
    if order.index(other) > order.index(role):
        return f"{other} gets its place after {role}, so write it there: {ROLES[other]}: {{{key}: {role}}}"
    return None


def _host(role: str, roles: Roles) -> str:
    """The role on whose node this one stands at last."""
    other = roles[role][1].colocate_with
    return _host(other, roles) if other else role
