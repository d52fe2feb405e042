"""`raylign models`: what the registry has."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from .output import notes, print_json, print_table
from .run import JsonOption, StorageOption


def models(storage: StorageOption = None, json: JsonOption = False) -> None:
    """List every model that can be asked for: its names, its digest, what it sits on, where it came from.

    Example: raylign models --json
    """
    from ..serve.foreground import announced
    from ..serve.registry import Registry

    root = (storage or Path("runs")).resolve() / "registry"
    registry = Registry(root)
    names: dict[str, list[str]] = {}
    for name, digest in registry.aliases().items():
        names.setdefault(digest, []).append(name)
    facts = [{"names": names.get(entry.digest, []), **asdict(entry)} for entry in registry.entries()]
    if json:
        print_json(facts)
        return
    print_table("models", ["names", "kind", "digest", "base", "run", "since"], [_row(fact) for fact in facts])
    if said := announced(root):
        notes.print(f"{said.url} serves {said.name}", markup=False, highlight=False)


def _row(fact: dict[str, Any]) -> list[str]:
    since = datetime.fromtimestamp(fact["created"]).strftime("%Y-%m-%d %H:%M")
    base = fact["base"][:12] if fact["kind"] == "adapter" else ""
    run = fact["provenance"].get("run", "")
    return [", ".join(fact["names"]), fact["kind"], fact["digest"][:12], base, run, since]
