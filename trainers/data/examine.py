"""A recipe's data alone, proven and looked at by the doctor: no reward, critic or cluster is touched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError
from ...rollout.rewards.functions import load_named, one_line
from ..config import RunConfig
from .doctor import Filter, Report, diagnose
from .files import read
from .inputs import locate_model
from .mixture import Source, load_data
from .ngrams import Grams, strings
from .proof import Proof, prove_stage
from .rows import kind_of_stage
from .template import load_tokenizer
from .vocabulary import check_vocabulary


@dataclass(frozen=True, slots=True)
class Examined:
    """One stage's rows: where they came from, the proof of what would be trained on, and the doctor's report."""

    sources: tuple[Source, ...]
    proof: Proof
    report: Report

    def facts(self) -> dict[str, Any]:
        """All of it as JSON."""
        return self.proof.facts() | {"sources": [s.facts() for s in self.sources], "doctor": self.report.facts()}


def examine(
    config: RunConfig, run: Path, benchmarks: Sequence[Path], filters: Sequence[str], *, near: bool
) -> list[Examined]:
    """Read, prove and diagnose the rows of every stage.

    Args:
        config: the recipe.
        run: the folder that `prepared://` paths lie below.
        benchmarks: files none of whose texts may stand in training rows, of any columns.
        filters: `file.py:function` each, called with a row's text; it gives a reason to flag it, or None.
        near: whether near-duplicates are looked for.
    """
    model = locate_model(config.model, run)
    tokenizer = load_tokenizer(model, chat=any(s.type != "cpt" for s in config.stages))
    check_vocabulary(tokenizer, model)
    against = {path.name: Grams(_benchmark(path)) for path in benchmarks}
    if config.evaluation:
        asked = load_data(config.evaluation.data, run, "prompt", config.seed).rows
        against["the evaluation"] = Grams(m["content"] for row in asked for m in row["prompt"] if m["role"] == "user")
    own = {_name(path): _filter(path) for path in filters}
    found = []
    for stage in config.stages:
        loaded = load_data(stage.data, run, kind_of_stage(stage), config.seed)
        report = diagnose(loaded.rows, against=against, filters=own, near=near)
        found.append(Examined(loaded.sources, prove_stage(stage, loaded.rows, tokenizer, places=loaded.places), report))
    return found


def _benchmark(path: Path) -> Iterator[str]:
    return (text for _, row in read(path) for text in strings(row))


def _name(path: str) -> str:
    return path.rpartition(":")[2]


def _filter(path: str) -> Filter:
    look = load_named(path, Path.cwd(), "filter")

    def flag(text: str) -> str | None:
        try:
            return look(text)
        except Exception as error:
            raise InputError(f"--flag {path} failed on {text[:60]!r}: {one_line(error)}") from error

    return flag
