"""`raylign models`: what the registry has, and which names point at what."""

from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import answer, notes, print_json, print_table
from .run import JsonOption, StorageOption

if TYPE_CHECKING:
    from ..serve.registry import Registry


class Action(StrEnum):
    """What to do with the registry."""

    LIST = "list"
    SHOW = "show"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    RETIRE = "retire"
    SPLIT = "split"


_WANTS = {
    Action.LIST: (0, ""),
    Action.SHOW: (1, "MODEL"),
    Action.PROMOTE: (2, "ALIAS MODEL"),
    Action.ROLLBACK: (1, "ALIAS"),
    Action.RETIRE: (1, "MODEL"),
    Action.SPLIT: (1, "NAME=MODEL:PART,MODEL:PART"),
}


def models(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.LIST,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="show MODEL, promote ALIAS MODEL, rollback ALIAS, retire MODEL, split NAME=a:90,b:10."),
    ] = None,
    why: Annotated[str, typer.Option(help="Kept with the move of a name.")] = "",
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """List models, or change which of them a name points at. Running services follow at once.

    A MODEL is an alias, a digest, or the first 8 digits of one or more. In a split the same user always gets the same
    model.

    Example: raylign models split sums=quickstart-grpo:90,quickstart-sft:10
    """
    from ..cluster.errors import InputError
    from ..serve.registry import Registry

    given = names or []
    number, wanted = _WANTS[action]
    if len(given) != number:
        raise InputError(f"raylign models {action} takes {wanted or 'no name'}, not {' '.join(given) or 'nothing'}")
    root = (storage or Path("runs")).resolve() / "registry"
    registry = Registry(root)
    if action is Action.LIST:
        _list(registry, json)
        return
    facts = _do(action, registry, given, why)
    print_json(facts) if json else _print(facts)


def _do(action: Action, registry: "Registry", given: list[str], why: str) -> dict[str, Any]:
    from ..serve.aliases import parse_split

    match action:
        case Action.PROMOTE:
            alias = registry.split(given[0], {registry.resolve(given[1]).digest: 1.0}, why=why)
        case Action.ROLLBACK:
            alias = registry.rollback(given[0], why=why)
        case Action.SPLIT:
            name, parts = parse_split(given[0])
            weights: dict[str, float] = {}
            for model, part in parts.items():
                digest = registry.resolve(model).digest
                weights[digest] = weights.get(digest, 0.0) + part
            alias = registry.split(name, weights, why=why)
        case _:
            entry = registry.find(given[0])
            if action is Action.RETIRE:
                registry.retire(entry.digest)
            return _facts(registry, entry, _names(registry))
    return alias.as_json()


def _names(registry: "Registry") -> dict[str, list[str]]:
    """The names of each digest, those that give it a part of their users too."""
    names: dict[str, list[str]] = {}
    for name in registry.aliases():
        for digest in registry.alias(name).now.weights:
            names.setdefault(digest, []).append(name)
    return names


def _facts(registry: "Registry", entry: Any, names: dict[str, list[str]]) -> dict[str, Any]:
    return {"names": names.get(entry.digest, []), "state": registry.state(entry.digest), **asdict(entry)}


def _list(registry: "Registry", json: bool) -> None:
    from ..serve.foreground import announced

    names = _names(registry)
    facts = [_facts(registry, entry, names) for entry in registry.entries()]
    if json:
        print_json(facts)
        return
    columns = ["names", "state", "kind", "digest", "base", "run", "since"]
    print_table("models", columns, [_row(fact) for fact in facts])
    if said := announced(registry.root):
        notes.print(f"{said.url} serves {said.name}", highlight=False)


def _row(fact: dict[str, Any]) -> list[str]:
    since = datetime.fromtimestamp(fact["created"]).strftime("%Y-%m-%d %H:%M")
    base = fact["base"][:12] if fact["kind"] == "adapter" else ""
    run = fact["provenance"].get("run", "")
    return [", ".join(fact["names"]), fact["state"], fact["kind"], fact["digest"][:12], base, run, since]


def _print(facts: dict[str, Any]) -> None:
    """A model's facts a line each, or where a name points now."""
    if "moves" in facts:
        shares = [f"{digest[:12]} {share:.0%}" for digest, share in facts["moves"][-1]["weights"].items()]
        answer.print(f"{facts['name']} is {', '.join(shares)}", highlight=False)
        return
    for key, value in facts.items():
        answer.print(f"{key}: {value}", highlight=False)
