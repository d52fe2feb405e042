"""`raylign keys`: who may ask the services of a storage."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .output import notes, print_json, print_table
from .run import JsonOption, StorageOption


class Action(StrEnum):
    """What to do with the keys."""

    list = "list"
    add = "add"
    remove = "remove"


def keys(
    action: Annotated[Action, typer.Argument(help="list, add NAME or remove NAME.")] = Action.list,
    name: Annotated[str | None, typer.Argument(help="Whose key it is.")] = None,
    models: Annotated[str | None, typer.Option(help="Models it may ask for, with commas; all by default.")] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="Of each replica.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Of prompts and answers, of each replica.")] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Make, list and remove API keys. Running services follow at once; with the first key they refuse who has none.

    The secret is printed once and kept nowhere.

    Example: raylign keys add alice --models quickstart
    """
    from ..cluster.errors import InputError
    from ..serve.keys import add_key, keys_path, read_keys, remove_key

    path = keys_path((storage or Path("runs")).resolve() / "registry")
    if action is Action.list:
        _print([key.model_dump(exclude={"sha256"}) for key in read_keys(path)], json)
        return
    if name is None:
        raise InputError(f"raylign keys {action} needs a name")
    if action is Action.remove:
        remove_key(path, name)
        notes.print(f"{name} is refused from now on", highlight=False)
        return
    allowed = tuple(model.strip() for model in models.split(",")) if models else None
    secret = add_key(
        path, name, models=allowed, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
    )
    print_json({"name": name, "key": secret}) if json else print(secret)


def _print(facts: list[dict[str, object]], json: bool) -> None:
    if json:
        print_json(facts)
        return
    columns = ["name", "models", "requests_per_minute", "tokens_per_minute"]
    rows = [[_cell(fact[column]) for column in columns] for fact in facts]
    print_table("keys", [column.replace("_", " ") for column in columns], rows)


def _cell(value: object) -> str:
    return "all" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)
