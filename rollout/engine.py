"""The engine protocol: what generates tokens, for rollout and for serving alike."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..cluster.errors import RunFailed
from .records import Completion, FinishReason, GenerationRequest


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of completion `index` of a request; `finish_reason` is set on its last one."""

    request_id: str
    index: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


class RequestsFailed(RunFailed):
    """Some requests of a step cannot go on and are forgotten; the engine's others can, with the next step."""

    def __init__(self, message: str, request_ids: frozenset[str]) -> None:
        super().__init__(message, request_ids)
        self.message, self.request_ids = message, request_ids

    def __str__(self) -> str:
        return self.message


class Engine(Protocol):
    """Continuous batching over one base model and any number of adapters; one thread calls it.

    Errors: `InputError` for a request that cannot be served (longer than the cache, unknown adapter, empty prompt);
    `RequestsFailed` from a step that only some requests did not survive.
    """

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running, or has tokens that no step has returned yet."""
        ...

    @property
    def max_length(self) -> int:
        """The most tokens a row can hold, prompt and completion together."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its rows enter as slots become free."""
        ...

    def step(self) -> list[TokenEvent]:
        """Advance every running row by one token and admit waiting ones; returns the new tokens."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request; its rows leave at once and no event of it follows."""
        ...

    def load_adapter(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Make an adapter (PEFT tensor names, PEFT `adapter_config`) available under its digest."""
        ...

    def load_base(self, tensors: dict[str, np.ndarray]) -> None:
        """Replace the base model's weights, by the names of its state dict."""
        ...

    def drop_adapter(self, digest: str) -> None:
        """Forget an adapter; refused with `InputError` while a request uses it."""
        ...

    def adapters(self) -> tuple[str, ...]:
        """Digests of the loaded adapters."""
        ...


def generate(engine: Engine, requests: list[GenerationRequest]) -> dict[str, list[Completion]]:
    """Run requests to their end on an idle engine; completions in sample order, by request id."""
    tokens = {(r.request_id, i): ([], []) for r in requests for i in range(r.n)}
    finished: dict[tuple[str, int], FinishReason] = {}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for event in engine.step():
            ids, logprobs = tokens[event.request_id, event.index]
            ids.append(event.token)
            logprobs.append(event.logprob)
            if event.finish_reason:
                finished[event.request_id, event.index] = event.finish_reason
    return {
        r.request_id: [
            Completion(
                tokens=np.array(tokens[r.request_id, i][0], np.int32),
                logprobs=np.array(tokens[r.request_id, i][1], np.float32),
                finish_reason=finished[r.request_id, i],
            )
            for i in range(r.n)
        ]
        for r in requests
    }
