"""Word n-grams of texts that must not stand in training data. Imports neither ray nor torch."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from .files import Row

LENGTH = 13
"""Words of an n-gram, as in the contamination studies of GPT-3 (2005.14165, appendix C)."""
SHORTEST = 5
"""Texts of fewer words are left out: they stand by chance in many a row."""
_WORD = re.compile(r"\w+")


class Grams:
    """All n-grams of some texts; a text of 5 to 12 words is one n-gram."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.short = 0
        """Texts of fewer than 5 words, which are not looked for."""
        self._grams: dict[str, set[str]] = {}  # by their first five words
        for text in texts:
            words = _WORD.findall(text.lower())
            if len(words) < SHORTEST:
                self.short += 1
            for gram in _grams(words, min(LENGTH, len(words))) if len(words) >= SHORTEST else ():
                self._grams.setdefault(" ".join(gram[:SHORTEST]), set()).add(" ".join(gram))

    def first_in(self, text: str) -> str:
        """The first n-gram that stands in a text; empty where there is none."""
        words = _WORD.findall(text.lower())
        for start, opening in enumerate(_grams(words, SHORTEST)):
            for gram in self._grams.get(" ".join(opening), ()):
                if " ".join(words[start : start + gram.count(" ") + 1]) == gram:
                    return gram
        return ""


def strings(row: Row) -> Iterator[str]:
    """Every text of a row as its file has it, whatever its columns are called."""
    waiting: list[Any] = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _grams(words: list[str], length: int) -> Iterator[list[str]]:
    return (words[i : i + length] for i in range(len(words) - length + 1))
