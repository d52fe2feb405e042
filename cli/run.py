"""`raylign run`: a recipe from start to finish, here or on a cluster."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cluster import supervisor
from .output import answer, notes, print_json, print_table
from .progress import progress_of

SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key: stages.1.learning_rate=1e-5.")]
StorageOption = Annotated[Path | None, typer.Option(help="Where run directories live; the recipe's, else ./runs.")]
MaxHoursOption = Annotated[
    float | None, typer.Option(min=0.0, help="Stop after so long, with a checkpoint; `resume` goes on.")
]
AfterOption = Annotated[list[str] | None, typer.Option("--after", help="Begin when that run has succeeded.")]
PriorityOption = Annotated[
    int | None, typer.Option(help="Queue for the cluster until there is room, higher numbers first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    name: Annotated[str | None, typer.Option(help="The run's name; the recipe's by default.")] = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster, host:port; a local Ray by default.")] = None,
    after: AfterOption = None,
    priority: PriorityOption = None,
    max_hours: MaxHoursOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on if a run of that name is there.")] = False,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", hidden=True, help="Copy the recipe's folder into the run and use the copy.")
    ] = False,
    prove_resume: Annotated[
        bool, typer.Option("--prove-resume", help="Only show, with a few steps, that a killed run ends the same.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a recipe here: on a local Ray, or on --address.

    Example: raylign run recipes/quickstart.yaml --set seed=2
    """
    from ..trainers.recipe import load_recipe

    overrides = list(set_ or [])
    overrides += [f"name={name}"] if name else []
    overrides += [f"cluster.address={address}"] if address else []
    overrides += when(after, priority, max_hours)
    config = load_recipe(recipe, overrides)

    if prove_resume:
        _prove_resume(recipe, config, overrides, storage or Path(config.storage), json=json)
        return

    from ..trainers.opening import open_run

    directory = open_run(config, storage or Path(config.storage), named=name is not None, resume=resume)
    if keep_source:
        from ..trainers.shipping import keep

        config = keep(recipe, overrides, directory)
    go(config, directory, json=json)


def when(after: list[str] | None, priority: int | None, max_hours: float | None) -> list[str]:
    """Overrides that say when a run begins and how long it works."""
    made = [f"cluster.after=[{', '.join(after)}]"] if after else []
    made += [f"cluster.priority={priority}"] if priority is not None else []
    return made + ([f"controller.max_hours={max_hours}"] if max_hours else [])


def _prove_resume(recipe: Path, config: Any, overrides: list[str], storage: Path, *, json: bool) -> None:
    """Print what a killed run and an undisturbed one have in common; exits with 1 where they differ."""
    from ..trainers.proof_of_resume import prove

    say = partial(notes.print, highlight=False)
    found, kills = prove(recipe, config, [o for o in overrides if not o.startswith("name=")], storage, say)
    if json:
        print_json({"equal": found.equal, "killed_after": kills, "same": found.same, "different": found.different})
    else:
        killed = ", ".join(f"{name} after {steps} steps" for name, steps in kills.items())
        rows = [[what, n, ", ".join(found.different[what]) or "none"] for what, n in found.same.items()]
        print_table(f"a run killed in {killed} and resumed, against one undisturbed", ["", "same", "different"], rows)
    if not found.equal:
        raise typer.Exit(1)


def go(config: Any, directory: Any, *, json: bool) -> None:
    """Launch or go on with a run, show its progress, print how it ended. Exits with 1 when it was stopped.

    What follows works in a process of its own, under a supervisor. One that has succeeded is left as it is.
    """
    if directory.summary().get("status") == directory.status().get("status") == "succeeded":
        notes.print(f"{directory.name} has succeeded already; it is not started again", highlight=False)
        summary = directory.summary()
        print_json(summary) if json else _print_summary(summary, directory)
        return

    def say(text: str) -> None:
        notes.print(text, style="dim", highlight=False)

    with directory.hold():
        notes.print(f"run {directory.name} in {directory.path}", highlight=False)
        attempt = supervisor.supervised(directory, config.controller, say)

        from ..trainers.launch import launch

        with progress_of(directory):
            summary = launch(config, directory, say, attempt=attempt)
    print_json(summary) if json else _print_summary(summary, directory)
    if summary["status"] != "succeeded":
        raise typer.Exit(1)


def _print_summary(summary: dict[str, Any], directory: Any) -> None:
    models = summary["evaluation"].get("models", {})
    if models:
        temperatures = [k for k in next(iter(models.values())) if k not in ("n", "errors", "examples")]
        rows = [[name, *(f"{m[t]:.1%}" for t in temperatures), m["n"]] for name, m in models.items()]
        print_table("held-out questions answered right", ["model", *temperatures, "questions"], rows)
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    answer.print(
        f"{summary['run']}: {summary['status']} after {minutes} min {seconds} s, "
        f"at most {summary['peak_memory_gb']:.1f} GB. {summary['reason']}",
        highlight=False,
    )
    if not summary.get("exact", True):
        answer.print(
            "not exact: its tokens depend on which rows ran together, so a repetition differs", highlight=False
        )
    answer.print(f"report: {directory / 'report.html'}", highlight=False)
    if summary["served"]:
        answer.print(f"serve it: raylign serve {directory.argument}", highlight=False)
