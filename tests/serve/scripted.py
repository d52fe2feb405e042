"""An engine without a model: each row says its text, a token a step, and the test decides how many there are."""

import threading
from typing import Any

import numpy as np
from raylign.cluster.errors import InputError
from raylign.rollout.engine import TokenEvent
from raylign.rollout.records import GenerationRequest


class ScriptedEngine:
    """Counts: a row's tokens are its prompt's first token, that plus one, and so on up to `max_tokens`."""

    def __init__(self, max_length: int = 64) -> None:
        self.max_length = max_length
        self.steps = threading.Semaphore(10**6)
        """How many steps it may take; fewer, and a test adds to them."""
        self.aborted: list[str] = []
        self.most_rows = 0
        self._rows: dict[tuple[str, int], tuple[GenerationRequest, int]] = {}
        self._loaded: dict[str, dict[str, Any]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    def submit(self, request: GenerationRequest) -> None:
        if len(request.prompt) + request.sampling.max_tokens > self.max_length:
            raise InputError("too long")
        self._rows |= {(request.request_id, i): (request, 0) for i in range(request.n)}

    def step(self) -> list[TokenEvent]:
        self.steps.acquire(timeout=30)
        self.most_rows = max(self.most_rows, len(self._rows))
        events = []
        for key, (request, done) in list(self._rows.items()):
            last = done + 1 == request.sampling.max_tokens
            self._rows[key] = (request, done + 1)
            if last:
                del self._rows[key]
            events.append(TokenEvent(*key, int(request.prompt[0]) + done, -1.0, "length" if last else None))
        return events

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._rows = {key: row for key, row in self._rows.items() if key[0] != request_id}

    def load_adapter(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        if digest in self._loaded:
            raise AssertionError("loaded twice")
        self._loaded[digest] = config

    def drop_adapter(self, digest: str) -> None:
        del self._loaded[digest]

    def adapters(self) -> tuple[str, ...]:
        return tuple(self._loaded)
