"""`raylign sweep`: the same recipe with other values of some keys, side by side."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answer, notes, print_json, print_table
from .run import JsonOption, SetOption, StorageOption


def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    param: Annotated[
        list[str], typer.Option(help="KEY=KIND(…): uniform, loguniform, randint (two bounds), choice, grid (a list).")
    ],
    trials: Annotated[int, typer.Option(min=1, help="How many trials; of a grid, how many of each.")] = 8,
    concurrent: Annotated[int | None, typer.Option(min=1, help="At once; as many as fit.")] = None,
    metric: Annotated[str | None, typer.Option(help="What is compared; the stage's reward, accuracy or loss.")] = None,
    mode: Annotated[str | None, typer.Option(help="min or max; by the metric.")] = None,
    stage: Annotated[str | None, typer.Option(help="The stage whose metric it is; the last.")] = None,
    grace: Annotated[int | None, typer.Option(min=1, help="Steps before a trial may be ended early.")] = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name; RECIPE-sweep by default.")] = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster, host:port; a local Ray by default.")] = None,
    json: JsonOption = False,
) -> None:
    """Try values of a recipe's keys with Ray Tune; trials that fall behind are ended early (ASHA).

    Every trial is a run of its own in STORAGE/NAME: it can be looked at, resumed and served. The same command goes on
    with a sweep that was interrupted.

    Example: raylign sweep recipes/dpo.yaml --param 'stages.0.learning_rate=loguniform(1e-6, 1e-4)' --trials 6
    """
    from ..cluster.config import NAME_PATTERN
    from ..cluster.errors import InputError
    from ..trainers.recipe import load_recipe
    from ..trainers.sweep.space import parse, require_valid

    if mode not in (None, "min", "max"):
        raise InputError(f"--mode {mode!r} is neither min nor max")
    params, overrides = parse(param), [*(set_ or []), *([f"cluster.address={address}"] if address else [])]
    config = load_recipe(recipe, overrides)
    require_valid(params, lambda more: load_recipe(recipe, [*overrides, *more]))
    called = name or f"{config.name}-sweep"
    if not re.match(NAME_PATTERN, called):
        raise InputError(f"--name {called!r}: letters, digits, '.', '_' and '-', 64 at most")

    from ..trainers.sweep.search import goal_of
    from ..trainers.sweep.sweep import Wishes, run_sweep

    goal = goal_of(config, stage, metric, mode)  # type: ignore[arg-type]  # checked above
    wishes = Wishes(params=params, goal=goal, trials=trials, concurrent=concurrent, grace=grace)
    folder = (storage or Path(config.storage)).resolve() / called
    facts = run_sweep(config, recipe, set_ or [], folder, wishes, lambda text: notes.print(text, highlight=False))
    print_json(facts) if json else _print(facts)
    if not facts["best"]:
        raise typer.Exit(1)


def _print(facts: dict[str, Any]) -> None:
    keys = list(dict.fromkeys(key for trial in facts["trials"] for key in trial["values"]))
    rows = [
        [
            t["run"],
            *(_short(t["values"].get(k)) for k in keys),
            _short(t["best"]),
            t["step"] or "",
            t["status"],
            t["reason"],
        ]
        for t in facts["trials"]
    ]
    print_table(
        f"{facts['sweep']}, best first", ["run", *keys, f"best {facts['metric']}", "step", "status", "reason"], rows
    )
    if facts["best"]:
        answer.print(f"best: {facts['best']}; plots: {Path(facts['plots'][0]).parent}", highlight=False)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
