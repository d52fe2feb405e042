"""The engine protocol: what generates tokens, for rollout and for serving alike."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..cluster.errors import InputError, RunFailed
from .records import MAX_TOP_LOGPROBS, Completion, FinishReason, GenerationRequest, Sampling, TopLogprobs


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of completion `index` of a request; `finish_reason` is set on its last one."""

    request_id: str
    index: int
    token: int
    logprob: float
    finish_reason: FinishReason | None
    top: TopLogprobs | None = None
    """`[n]`, where the request asked for `n` top log-probs."""


def completion_of(events: Sequence[TokenEvent]) -> Completion:
    """What the events of one row, from its first token to its last, add up to."""
    finish_reason = events[-1].finish_reason
    assert finish_reason, "the row goes on"
    tops = [event.top for event in events if event.top]
    return Completion(
        tokens=np.array([event.token for event in events], np.int32),
        logprobs=np.array([event.logprob for event in events], np.float32),
        finish_reason=finish_reason,
        top=TopLogprobs(np.stack([top.ids for top in tops]), np.stack([top.logprobs for top in tops]))
        if tops
        else None,
    )


def check_request(
    request: GenerationRequest,
    *,
    running: Collection[str],
    vocabulary: int,
    max_length: int,
    adapters: Collection[str],
) -> None:
    """What every engine refuses before it takes a request: raises `InputError` with what is wrong and its value."""
    name, prompt, sampling = request.request_id, request.prompt, request.sampling
    if name in running:
        raise InputError(f"request {name!r} is already running")
    if prompt.ndim != 1 or not len(prompt):
        raise InputError(f"request {name!r} has an empty prompt")
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise InputError(f"request {name!r} has token ids outside of 0 … {vocabulary - 1}")
    if request.n < 1 or sampling.max_tokens < 1:
        raise InputError(f"request {name!r} asks for n={request.n}, max_tokens={sampling.max_tokens}: both need 1")
    if len(prompt) + sampling.max_tokens > max_length:
        raise InputError(
            f"request {name!r} needs {len(prompt)} prompt + {sampling.max_tokens} new tokens, "
            f"the engine holds {max_length}: shorten the prompt or max_tokens"
        )
    _check_sampling(name, sampling, vocabulary)
    if request.adapter is not None and request.adapter not in adapters:
        raise InputError(f"request {name!r} asks for adapter {request.adapter[:12]}, which is not loaded")


def _check_sampling(name: str, sampling: Sampling, vocabulary: int) -> None:
    allowed = (
        ("temperature", 0 <= sampling.temperature < math.inf, "at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "at least 0"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 to 1"),
        ("top_logprobs", 0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"),
        ("presence_penalty", math.isfinite(sampling.presence_penalty), "a finite number"),
        ("frequency_penalty", math.isfinite(sampling.frequency_penalty), "a finite number"),
    )
    for setting, good, range_ in allowed:
        if not good:
            raise InputError(f"request {name!r} has {setting} {getattr(sampling, setting)}: it must be {range_}")
    for token, bias in sampling.logit_bias:
        if not (0 <= token < vocabulary and math.isfinite(bias)):
            raise InputError(
                f"request {name!r} has logit_bias {bias} for token {token}: it takes finite numbers for tokens "
                f"0 … {vocabulary - 1}"
            )


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
    events: dict[str, list[list[TokenEvent]]] = {r.request_id: [[] for _ in range(r.n)] for r in requests}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for event in engine.step():
            events[event.request_id][event.index].append(event)
    return {request_id: [completion_of(row) for row in rows] for request_id, rows in events.items()}
