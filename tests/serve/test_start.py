"""A start that does not come to its end leaves no Ray Serve behind."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]
from raylign.serve.config import ServeConfig
from raylign.serve.deploy import start

from .conftest import Shelf


class Stop(Exception):
    pass


def _stop() -> None:
    raise Stop


def _needs_lock() -> Callable[..., Any]:
    lock = threading.Lock()
    return lambda *_: lock


@pytest.mark.parametrize(
    ("options", "error"),
    [({"tick": _stop}, Stop), ({"build": _needs_lock()}, TypeError)],
    ids=["asked to stop", "cannot be deployed"],
)
def test_what_ends_a_start_ends_ray_serve(
    options: dict[str, Any], error: type[Exception], ray_session: str, shelf: Shelf
) -> None:
    with pytest.raises(error):
        start(
            ServeConfig(alias="first"),
            name="unfinished",
            base=Path(shelf.base.path),
            registry=shelf.registry.root,
            **options,
        )
    assert _get_global_client(raise_if_no_controller_running=False) is None
