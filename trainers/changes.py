"""What a recipe may change between two attempts of one run, and what would make it another run.

Workers, resources and intervals may: they leave the result as it is. Imports neither ray nor torch.
"""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from ..cluster.errors import InputError
from .config import RunConfig
from .recipe import PATH_KEYS

_RESULT = {"seed", "model", "prepare", "stages"}
_FREE = {
    "workers",
    "resources",
    "policy",
    "reference",
    "slots",
    "micro_batch_size",
    "micro_batch_tokens",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "max_failures",
    "timeout_seconds",
    "health_seconds",
}
"""Keys that leave the result as it is, with all that lies under them."""


def refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Raise `InputError` with the first key whose change would mix two experiments in one run.

    Of paths only the last part counts: a run that is submitted again finds its files in another folder.
    """
    old, new = _leaves(before), _leaves(now)
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            raise InputError(
                f"run {now.name!r} began with {_shown(old, key)} and the recipe now has {_shown(new, key)}: "
                "put it back, or begin another run with --name"
            )


def _leaves(config: RunConfig) -> dict[str, Any]:
    return dict(_walk(config.model_dump(mode="json", include=_RESULT), ()))


def _walk(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list):
        yield ".".join(place), PurePath(value).name if place[-1] in PATH_KEYS and value else value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in _FREE:
            yield from _walk(part, (*place, str(key)))


def _shown(leaves: dict[str, Any], key: str) -> str:
    return f"{key} {leaves[key]!r}" if key in leaves else f"no {key}"
