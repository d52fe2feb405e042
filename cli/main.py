"""The `raylign` command: one file a verb; errors become one line and an exit code."""

import importlib
import sys
import traceback
from typing import Annotated

import typer

from ..cluster.errors import RaylignError
from .output import notes

VERBS = (
    "run",
    "check",
    "status",
    "why",
    "trace",
    "top",
    "report",
    "stop",
    "resume",
    "sweep",
    "scale",
    "submit",
    "logs",
    "up",
    "down",
    "serve",
    "query",
    "chat",
    "models",
    "keys",
    "eval",
    "merge",
    "export",
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
    """Options of every verb."""


def main() -> None:
    """Run one command. Exit codes: 0 done, 1 failed, 2 wrong input, 3 does not fit, 4 not found, 5 no cluster."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[a for a in arguments if a != "--debug"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  a defect of ours is one line too; --debug shows where it lies
        if debug:
            traceback.print_exc()
        notes.print("error:", style="red", end=" ")
        notes.print(f"{type(error).__name__}:", end=" ")
        notes.print(_one_line(error), highlight=False)
        sys.exit(error.exit_code if isinstance(error, RaylignError) else 1)


def _one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines())
    return text if isinstance(error, RaylignError) else f"{text} (not foreseen: --debug shows the traceback)"
