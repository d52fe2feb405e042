"""A service that lives as long as one process: on a Ray of its own, announced beside the registry it serves."""

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..cluster.config import ClusterConfig
from ..cluster.errors import InputError, NotFound
from ..cluster.rundir import write_atomically
from ..cluster.session import connect
from ..cluster.versions import require_equal
from .config import ServeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What `service.json` says: where a registry's service answers, and the process that keeps it up."""

    name: str
    url: str
    pid: int
    started: float
    """When that process began, in seconds since the epoch: another one may get its number later."""


@contextmanager
def serving(
    config: ServeConfig, *, name: str, base: Path, registry: Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Iterator[str]:
    """Serve for as long as the block lasts; gives the URL.

    Starts a local Ray with what the replicas reserve and nothing else, unless `RAY_ADDRESS` names one. Raises
    `InputError` where a service for this registry is up already.
    """
    import psutil

    from . import deploy

    if there := announced(registry):
        raise InputError(
            f"{registry} is served already, by process {there.pid} at {there.url} ({there.name}): "
            "end that one first, or ask it"
        )
    cpus = max(1, math.ceil(config.replicas.max * config.resources.cpus))
    with connect(ClusterConfig(cpus=cpus), dashboard=False) as session:
        if not session.local:
            require_equal()
        url = deploy.start(config, name=name, base=base, registry=registry, dtype=dtype)
        began = psutil.Process().create_time()
        said = Announcement(name=name, url=url, pid=os.getpid(), started=began)
        write_atomically(registry / "service.json", json.dumps(asdict(said), indent=1))
        try:
            yield url
        finally:
            (registry / "service.json").unlink(missing_ok=True)
            if not session.local:
                deploy.stop(name)


def announced(registry: Path) -> Announcement | None:
    """The service that is up for a registry; none where nobody announced one, or its process is gone."""
    import psutil

    try:
        said = Announcement(**json.loads((registry / "service.json").read_text()))
        alive = psutil.Process(said.pid).create_time() == said.started
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return said if alive else None


def service_url(registry: Path) -> str:
    """Where the registry's service answers. Raises `NotFound` where none is up."""
    if said := announced(registry):
        return said.url
    raise NotFound(f"no service is up for {registry}: start one with `raylign serve RUN`, or give --url")


def wait_for_signal() -> None:
    """Return once this process got SIGINT or SIGTERM; call it on the main thread."""
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asked.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
