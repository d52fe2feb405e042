"""JSON Schema as a reward, and whether a schema is one. No reference leaves the schema: nothing is fetched."""

import json
from typing import Any

from .functions import Row, ScoreFunction


def schema_fault(schema: dict[str, Any]) -> str:
    """What is wrong with a schema and where, or nothing."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"{'.'.join(map(str, error.absolute_path)) or 'the schema'}: {error.message}"
    return ""


def schema_function(schema: dict[str, Any]) -> ScoreFunction:
    """`f(completion, row)`: 1.0 for JSON that the schema allows, else 0.0."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())

    def score(completion: str, row: Row) -> float:
        try:
            value = json.loads(completion, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator.is_valid(value) else 0.0

    return score


def _refuse(constant: str) -> None:
    """`NaN` and the infinities are no JSON."""
    raise ValueError(constant)
