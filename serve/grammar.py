"""Grammars of answers in llguidance's notation. Imports neither ray nor torch; the engine compiles them."""

import json
from typing import Any

from .api_errors import bad_request

MOST_CHARACTERS = 65_536
"""A larger grammar takes the engine's thread seconds to compile."""
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
"""One way of writing JSON, that of Python's `json`: a model that may put in space may do so without an end."""


def strict_json(schema: dict[str, Any]) -> str:
    """A JSON Schema in which everything counts: keywords that the library does not know are refused."""
    return json.dumps(schema | {"x-guidance": _FORM})


def json_grammar(schema: dict[str, Any]) -> str:
    """A grammar of the JSON that a schema allows."""
    return f"start: %json {strict_json(schema)}"


def quoted(text: str) -> str:
    """A text as it stands in a grammar."""
    return json.dumps(text)


def check_size(grammar: str, param: str) -> str:
    """The grammar itself; raises a 400 for one that is too large."""
    if len(grammar) > MOST_CHARACTERS:
        raise bad_request(f"the schemas have {len(grammar)} characters, more than {MOST_CHARACTERS}", param=param)
    return grammar
