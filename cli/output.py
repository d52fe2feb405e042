"""How verbs print: facts as JSON or a short table on stdout, everything said along the way on stderr."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

answer = Console(soft_wrap=True)
"""The answer of a command; nothing else goes to stdout."""

notes = Console(stderr=True, soft_wrap=True)
"""Progress, warnings and errors."""


def print_json(data: Any) -> None:
    """Print facts for a program: plain JSON, no colour, no wrapping."""
    print(json.dumps(data, indent=1, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print facts for a person."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # a pipe has no edge: nothing is cut for it
    (answer if answer.is_terminal else Console(width=1000)).print(table)
