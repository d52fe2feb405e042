"""Whether the nodes of a cluster have what this process has: Python, Ray, torch and this package.

Functions and records cross as pickles, and the same bits come of the same libraries alone. So Ray and this package must
be equal, Python and torch to their minor version; what else differs is told and goes on.
"""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .errors import InputError

Versions = dict[str, str]
"""By name; empty where a package is not installed."""

_PACKAGES = ("ray", "torch", "raylign")
_WHOLE = ("ray", "raylign")
_ASK_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One version that differs on a node, and whether a run can go on with it."""

    node: str
    name: str
    here: str
    there: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.name} is {self.there or 'not installed'} on node {self.node} and {self.here or 'none'} here"


def here() -> Versions:
    """Of this process."""
    return {"python": platform.python_version(), **{name: _installed(name) for name in _PACKAGES}}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def differences(mine: Versions, nodes: Mapping[str, Versions]) -> list[Difference]:
    """What differs, the fatal ones first."""
    found = [
        Difference(
            node=node, name=name, here=mine[name], there=theirs[name], fatal=_fatal(name, mine[name], theirs[name])
        )
        for node, theirs in nodes.items()
        for name in mine
        if mine[name] != theirs[name]
    ]
    return sorted(found, key=lambda d: not d.fatal)


def _fatal(name: str, mine: str, theirs: str) -> bool:
    if name in _WHOLE or not theirs:
        return True
    return mine.split(".")[:2] != theirs.split(".")[:2]


def of_nodes() -> dict[str, Versions]:
    """Of every living node of the connected cluster, by its address. Raises `InputError` where one does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = _PACKAGES

    def ask() -> dict[str, str]:  # by value: a node may not have this package
        from importlib import metadata
        from platform import python_version

        found = {"python": python_version()}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = ""
        return found

    task = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    }
    try:
        return dict(zip(asked, ray.get(list(asked.values()), timeout=_ASK_SECONDS), strict=True))
    except RayError as error:
        raise InputError(f"the nodes do not say which versions they have: {str(error).splitlines()[0]}") from error


def require_equal() -> list[str]:
    """Compare with every node; gives what differs and does not matter. Raises `InputError` with the first that does."""
    found = differences(here(), of_nodes())
    fatal = [d for d in found if d.fatal]
    if fatal:
        more = f" ({len(fatal) - 1} more differ)" if len(fatal) > 1 else ""
        raise InputError(f"{fatal[0]}{more}: {_mend(fatal[0])}")
    return [str(d) for d in found]


def _mend(difference: Difference) -> str:
    name = difference.name
    if name == "python":
        return f"use an image with Python {'.'.join(difference.here.split('.')[:2])}, or run from its Python"
    if name == "raylign":
        return "send a wheel of this one (`raylign submit --wheel`), or install the same on both"
    return f"install {name}=={difference.here or difference.there} on both (this is {sys.executable})"
