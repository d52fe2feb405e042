"""What runs in a Ray Serve replica: an engine on its own thread behind the HTTP application."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..cluster.imports import importing
from ..rollout.engine import Engine
from ..rollout.engine_thread import EngineThread
from ..rollout.engines import ENGINES
from .config import Guard, Limits
from .keys import KeyRing, keys_path
from .reconcile import Reconciler
from .registry import Registry

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What every replica of a service is built from; both folders must be readable on its node."""

    base: str
    """Digest of the base model, registered."""
    registry: Path
    slots: int
    max_length: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
    rollback: Guard = field(default_factory=Guard)

    @property
    def keys(self) -> Path:
        """Where the service's API keys are, if it has any."""
        return keys_path(self.registry)


BuildEngine = Callable[[ReplicaSpec, Path], Engine]
"""Makes the engine of a model folder, on the thread that will own it."""


def native_engine(spec: ReplicaSpec, folder: Path) -> Engine:
    """The embedded engine, as rollout workers build it."""
    return ENGINES["native"](folder, spec.slots, spec.max_length, spec.dtype, spec.device)


class Replica:
    """The class that Ray Serve deploys; it replaces a replica whose engine no longer answers."""

    def __init__(self, spec: ReplicaSpec, build: BuildEngine = native_engine) -> None:
        from .service import Service

        registry = Registry(spec.registry)
        base = registry.resolve(spec.base)
        with importing():  # most of transformers comes with its first object
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(base.path)
        self._engine = EngineThread(lambda: build(spec, Path(base.path)))
        self._service = Service(
            engine=self._engine,
            tokenizer=tokenizer,
            registry=registry,
            base=base,
            limits=spec.limits,
        )
        self._keys = KeyRing(spec.keys)
        self._reconciler = Reconciler(
            registry=registry,
            base=base,
            adapters=self._service.adapters,
            outcomes=self._service.outcomes,
            guard=spec.rollback,
            replica=uuid.uuid4().hex,
        )

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from .app import build_app

        app = build_app(self._service, self._keys)
        app.router.lifespan_context = self._following  # Ray Serve begins it before the replica gets requests
        return app

    @asynccontextmanager
    async def _following(self, app: "FastAPI") -> AsyncIterator[None]:
        """Follow the registry as long as the application lives; its first round is over before a request comes."""
        await self._reconciler.round()
        task = asyncio.ensure_future(self._reconciler.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def check_health(self) -> None:
        """Called by Ray Serve; raises when the engine does not answer."""
        await self._service.busy()
