"""The data doctor: what is odd about rows that can all be trained on. It counts, shows and drops nothing.

    empty               a text or message without a letter, digit or sign
    unreadable          more than 1 % replacement or control characters: a wrong encoding
    repetitive          one line or word makes up most of a long text
    overlong            more than 100,000 characters
    exact_duplicate     the same text as an earlier row, up to white space and case
    near_duplicate      a Jaccard similarity of word 5-grams above 0.8 to an earlier row, by MinHash (datasketch)
    shared with …       13 words in a row that stand in a benchmark or evaluation, too (GPT-3 2005.14165, appendix C)

Imports neither ray nor torch.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from .files import Row
from .ngrams import Grams

Filter = Callable[[str], str | None]
"""A user's own look at a row's text: a reason to flag it, such as its language, or nothing."""

EXAMPLES = 5
OVERLONG = 100_000
_UNREADABLE = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(slots=True)
class Finding:
    """How many rows have one oddity, and the first of them: row numbers from 1 with what was seen."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: int, seen: str) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"row": row, "seen": seen[:120]})


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor found; `lengths` counts rows by characters, each key the upper end (a power of two)."""

    rows: int
    lengths: dict[int, int]
    findings: dict[str, Finding]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The report as JSON."""
        found = {name: {"count": f.count, "examples": f.examples} for name, f in self.findings.items()}
        return {"rows": self.rows, "lengths": self.lengths, "findings": found, "seconds": round(self.seconds, 3)}


def diagnose(
    rows: Sequence[Row],
    *,
    against: Mapping[str, Grams] | None = None,
    filters: Mapping[str, Filter] | None = None,
    near: bool = False,
) -> Report:
    """Look at every row.

    Args:
        rows: of any kind, as `read_rows` gives them.
        against: word n-grams of evaluations and benchmarks by their names.
        filters: the user's own, by their names.
        near: also look for near-duplicates, which takes some hundred times as long.
    """
    start = time.perf_counter()
    lengths: Counter[int] = Counter()
    findings: dict[str, Finding] = {}
    earlier: dict[bytes, int] = {}
    texts = [list(parts(row)) for row in rows]
    for number, pieces in enumerate(texts, 1):
        text = "\n".join(pieces)
        lengths[1 << max(0, len(text) - 1).bit_length()] += 1
        for name, seen in (
            *_odd(pieces, text),
            *_copies(text, number, earlier),
            *_shared(text, against or {}),
            *_flagged(text, filters or {}),
        ):
            findings.setdefault(name, Finding()).add(number, seen)
    if near:
        from .near import near_duplicates

        unique = set(earlier.values())
        for number, first in near_duplicates(["\n".join(pieces) for pieces in texts]):
            if number in unique:
                seen = f"row {first}: {texts[number - 1][0]}"
                findings.setdefault("near_duplicate", Finding()).add(number, seen)
    return Report(len(rows), dict(sorted(lengths.items())), findings, time.perf_counter() - start)


def parts(row: Row) -> Iterator[str]:
    """The texts of a row of any kind: its document, or the messages in their order."""
    if "text" in row:
        yield row["text"]
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        for message in row.get(name, ()):
            yield message["content"] or str(message.get("tool_calls", ""))
    yield from row.get("completions", ())


def _odd(pieces: list[str], text: str) -> Iterator[tuple[str, str]]:
    if not pieces or not all(piece and not piece.isspace() for piece in pieces):
        yield "empty", text
    if len(text) > OVERLONG:
        yield "overlong", f"{len(text)} characters: {text[:60]}"
    if len(_UNREADABLE.findall(text)) > len(text) / 100:
        yield "unreadable", repr(text[:60])
    if len(text) > 200 and (most := _repeated(text)):
        yield "repetitive", most


def _repeated(text: str) -> str:
    """A word or line that makes up more than half of a text, where there is one."""
    for units in (text.split(), [line for line in text.split("\n") if line.strip()]):
        if len(units) < 10:
            continue
        unit, times = Counter(units).most_common(1)[0]
        if times > len(units) / 2:
            return f"{times} times {unit[:60]!r}"
    return ""


def _copies(text: str, number: int, earlier: dict[bytes, int]) -> Iterator[tuple[str, str]]:
    digest = blake2b(" ".join(text.split()).casefold().encode(errors="surrogatepass"), digest_size=16).digest()
    first = earlier.setdefault(digest, number)
    if first != number:
        yield "exact_duplicate", f"row {first}: {text}"


def _shared(text: str, against: Mapping[str, Grams]) -> Iterator[tuple[str, str]]:
    for name, grams in against.items():
        if shared := grams.first_in(text):
            yield f"shared with {name}", shared


def _flagged(text: str, filters: Mapping[str, Filter]) -> Iterator[tuple[str, str]]:
    for name, look in filters.items():
        if reason := look(text):
            yield name, reason
