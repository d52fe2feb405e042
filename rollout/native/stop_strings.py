"""Ending a row at a stop string, token by token."""

from collections.abc import Sequence
from typing import Any

_MARGIN = 4
"""Tokens decoded before those that can hold the string: a decoder may drop a leading space or await whole letters."""


class StopStrings:
    """Watches one row for any of some strings; special tokens count with their text.

    Every token is at least a byte long, so a string that ends in the newest token lies within as many tokens as it has
    bytes, and only these are decoded.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._reach = max((len(stop.encode()) for stop in self._stops), default=0) + _MARGIN
        self._tokens: list[int] = []

    def push(self, token: int) -> bool:
        """Take a new token; True when it completes one of the strings."""
        self._tokens = [*self._tokens[-self._reach :], token]
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stops)
