"""The application over a real engine behind a real HTTP server, in this process: what a replica runs, without Ray."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn
from raylign.rollout.engine_thread import EngineThread
from raylign.serve.app import build_app
from raylign.serve.config import Limits
from raylign.serve.keys import KeyRing
from raylign.serve.registry import Registry
from raylign.serve.replica import ReplicaSpec, native_engine
from raylign.serve.service import Service
from transformers import AutoTokenizer

Engine = Any


@dataclass(frozen=True)
class Live:
    """A service that answers at `url`, and what it is made of."""

    url: str
    service: Service
    engine: Engine
    app: Any

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        settings = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **settings)

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, trust_env=False, timeout=60, **options)

    def until_idle(self, seconds: float = 60) -> bool:
        """Whether the engine comes to have no work within so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.engine.busy:
                return True
            time.sleep(0.01)
        return False


def on_one_thread(spec: ReplicaSpec, folder: Path) -> Engine:
    """The native engine with the exactness that a replica has."""
    torch.set_num_threads(1)
    return native_engine(spec, folder)


@contextmanager
def live(
    registry: Registry, base: str, *, limits: Limits | None = None, engine: Engine = None, slots: int = 8
) -> Iterator[Live]:
    """Serve a registered base until the block ends, on the native engine unless another is given."""
    entry = registry.resolve(base)
    spec = ReplicaSpec(base=entry.digest, registry=registry.root, slots=slots, max_length=1024)
    made: list[Engine] = []

    def build() -> Engine:
        made.append(engine if engine is not None else on_one_thread(spec, Path(entry.path)))
        return made[0]

    thread = EngineThread(build)
    tokenizer = AutoTokenizer.from_pretrained(entry.path)
    service = Service(engine=thread, tokenizer=tokenizer, registry=registry, base=entry, limits=limits)
    app = build_app(service, KeyRing(spec.keys))
    with socket.create_server(("127.0.0.1", 0)) as free, _serving(app, free):
        yield Live(f"http://127.0.0.1:{free.getsockname()[1]}", service, made[0], app)
    thread.close()


@contextmanager
def _serving(app: Any, listener: socket.socket) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
