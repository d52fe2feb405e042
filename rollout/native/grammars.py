"""Grammars of one model's tokens, by llguidance: which tokens may come next in a text that a grammar allows."""

from collections import OrderedDict
from typing import Any

from ...cluster.errors import InputError

_KEPT = 32


class Grammars:
    """Compiles grammars for a tokenizer and keeps the newest of them. Raises `InputError` for a slow tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self._tokenizer = from_tokenizer(tokenizer)
        except ValueError as error:
            raise InputError(f"grammars need a fast tokenizer: {error}") from None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, grammar: str) -> Any:
        """A new `LLMatcher` at the beginning of a text. Raises `InputError` for a grammar that cannot be used."""
        from llguidance import LLMatcher

        if grammar not in self._compiled:
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0)
            if compiled.is_error():
                raise InputError(f"the grammar cannot be used: {compiled.get_error().splitlines()[0]}")
            self._compiled[grammar] = compiled
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()
