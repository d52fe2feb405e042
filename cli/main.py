"""The `raylign` command: one file a verb; errors become one line and an exit code."""

import importlib
import sys
from typing import Annotated

import typer

from ..cluster.errors import RaylignError
from .output import notes

VERBS = (
    "run",
    "check",
    "status",
    "stop",
    "resume",
    "scale",
    "submit",
    "logs",
    "up",
    "down",
    "serve",
    "query",
    "models",
)
"""Each is a module here with a function of the same name; `--help` lists them in this order."""

app = typer.Typer(
    name="raylign",
    help="Post-train language models on a Ray cluster and serve what was trained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in VERBS:
    app.command(verb)(getattr(importlib.import_module(f".{verb}", __package__), verb))


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Options that come before the verb."""


def main() -> None:
    """Run one command. Exit codes: 0 done, 1 failed, 2 wrong input, 3 does not fit, 4 not found, 5 no cluster."""
    try:
        app()
    except RaylignError as error:
        if "--debug" in sys.argv:
            raise
        notes.print(f"[red]error:[/red] {type(error).__name__}:", end=" ")
        notes.print(str(error), markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
