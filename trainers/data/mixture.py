"""All rows a section of a recipe reads: its source, those mixed in, and the side of a split that it takes.

Which rows these are is a function of the files, the recipe and its seed, so steps that draw from them stay a function
of seed and step. Imports neither ray nor torch.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...cluster.errors import InputError
from ..recipe import resolve_prepared
from ..stages import DataConfig
from .files import HUB, Place, Row, fetch
from .rows import Kind, read_rows

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Source:
    """What was read of one path: the format it had, its rows, and how many of them (repeated by weight) are taken."""

    path: str
    format: str
    rows: int
    taken: int

    def facts(self) -> dict[str, Any]:
        """What was read, as JSON."""
        return {"path": self.path, "format": self.format, "rows": self.rows, "taken": self.taken}

    def __str__(self) -> str:
        part = "" if self.taken == self.rows else f", of which {self.taken} are taken"
        return f"{self.path}: {self.rows} rows of format {self.format}{part}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of a section and where they came from."""

    rows: list[Row]
    places: list[Place]
    """Where each row stands."""
    sources: tuple[Source, ...]


def load_data(config: DataConfig, run: Path, kind: Kind, seed: int) -> Loaded:
    """The rows of a `data` section. Raises `InputError` for what cannot be read, and where a split leaves nothing.

    Args:
        config: the section.
        run: the run's directory, below which `prepared://` paths lie.
        kind: what the stage trains on.
        seed: the run's, for the rows that a weight's fraction takes.
    """
    rows: list[tuple[Place, Row]] = []
    sources: list[Source] = []
    for number, source in enumerate((config, *config.mixture)):
        read = read_rows(source, _locate(source.path, run), kind, config.split)
        taken = repeated(list(zip(read.places, read.rows, strict=True)), source.weight, f"{seed} {number}")
        sources.append(Source(source.path, read.format, read.found, len(taken)))
        rows += taken
    if not rows:
        raise InputError(f"{config.path}: the split and weights leave no rows: raise split.held_out or weight")
    return Loaded([row for _, row in rows], [place for place, _ in rows], tuple(sources))


def repeated(rows: list[Item], weight: float, seed: str) -> list[Item]:
    """Every row ⌊weight⌋ times, and of the rest a share drawn with the seed, in the order of the file."""
    times, part = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(rows)), round(part * len(rows)))
    return rows * int(times) + [rows[i] for i in sorted(drawn)]


def _locate(path: str, run: Path) -> Path:
    return fetch(path) if path.startswith(HUB) else resolve_prepared(path, run)
