"""How verbs print: facts as JSON or a short table on stdout, everything said along the way on stderr."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

_CONTROLS = re.compile(r"(\x1b\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What commands a terminal or turns the direction of text, except tabs, ends of lines, and colours (the group)."""


def plain(text: str, *, colours: bool = False) -> str:
    """Text that came from a run, for a terminal: what would command the terminal is written as `\\x1b`.

    A model's answer, a reward's message or a data row may hold anything: a line that renames the window, moves the
    cursor over other lines, or fills the clipboard. With `colours`, those stay.
    """
    return _CONTROLS.sub(lambda m: m[0] if m[1] and colours else ascii(m[0])[1:-1], text)


class _Terminal(Console):
    """A console that takes text as it is: no markup in it counts, and nothing in it commands the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


answer = _Terminal(soft_wrap=True, markup=False, emoji=False)
"""The answer of a command; nothing else goes to stdout."""

notes = _Terminal(stderr=True, soft_wrap=True, markup=False, emoji=False)
"""Progress, warnings and errors."""


def write(text: str) -> None:
    """Write what a run or a model said, at once: to a terminal as `plain` text with its colours, to a pipe as it is."""
    sys.stdout.write(plain(text, colours=True) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(data: Any) -> None:
    """Print facts for a program: plain JSON, no colour, no wrapping."""
    print(json.dumps(data, indent=1, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print facts for a person."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(plain(str(cell)) for cell in row))
    # a pipe has no edge: nothing is cut for it
    (answer if answer.is_terminal else _Terminal(width=1000, markup=False, emoji=False)).print(table)
