"""`raylign serve`: keep a finished run's models up until Ctrl-C."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answer, notes, print_json
from .run import JsonOption, StorageOption


def serve(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The recipe's by default; 0 takes a free one.")
    ] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a run's base and every adapter of it, OpenAI-compatible, on a local Ray, until Ctrl-C.

    Example: raylign serve quickstart --port 8000
    """
    from ..cluster.rundir import RunDir
    from ..serve.config import ServeConfig
    from ..serve.foreground import serving, wait_for_signal
    from ..trainers.recipe import load_recipe

    directory = RunDir.find((storage or Path("runs")).resolve(), run)
    base = _base_of(directory)
    recipe = load_recipe(directory / "recipe.yaml")
    config = recipe.serve or ServeConfig(alias=run)
    if port is not None:
        config = config.model_copy(update={"port": port})
    registry = directory.path.parent / "registry"
    notes.print(f"starting Ray and the service of {run}", highlight=False)
    with serving(config, name=run, base=Path(base.path), registry=registry, dtype=recipe.model.dtype) as url:
        facts = {"run": run, "url": url, "models": _models(registry, base.digest)}
        print_json(facts) if json else _print_facts(facts, config.alias)
        wait_for_signal()
        notes.print("ending")


def _base_of(directory: Any) -> Any:
    from ..cluster.errors import NotFound
    from ..serve.registry import Registry

    try:
        return Registry(directory.path.parent / "registry").resolve(f"{directory.name}-base")
    except NotFound:
        status = directory.status().get("status", "not begun")
        raise NotFound(
            f"run {directory.name!r} has published nothing to serve (it is {status}): a run publishes at its end, "
            "if its recipe has a serve section"
        ) from None


def _models(registry: Path, base: str) -> list[str]:
    from ..serve.registry import Registry

    shelf = Registry(registry)
    return [name for name in shelf.aliases() if shelf.resolve(name).base == base]


def _print_facts(facts: dict[str, Any], alias: str) -> None:
    model = alias if alias in facts["models"] else facts["models"][0]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    address = f"{facts['url']}/v1/chat/completions"
    for line in (
        f"{facts['url']}/v1 answers as {', '.join(facts['models'])}",
        f"  raylign query {model} Hello",
        f"  curl {address} -H 'content-type: application/json' -d {shlex.quote(body)}",
        "Ctrl-C ends it",
    ):
        answer.print(line, highlight=False)
