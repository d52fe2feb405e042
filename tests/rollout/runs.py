"""Requests and how they are run, for the tests of engines."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from raylign.rollout.engine import Engine, TokenEvent, completion_of
from raylign.rollout.records import Completion, GenerationRequest, Sampling, SeedKey

from .models import VOCABULARY


def request(
    number: int, length: int = 6, *, n: int = 1, adapter: str | None = None, **sampling: Any
) -> GenerationRequest:
    """A request named `r<number>` with a random prompt; 12 new tokens at temperature 1 unless `sampling` says so."""
    rng = np.random.default_rng(number)
    return GenerationRequest(
        request_id=f"r{number}",
        prompt=rng.integers(3, VOCABULARY, length).astype(np.int32),
        sampling=Sampling(**{"max_tokens": 12} | sampling),
        seed=SeedKey(5, 0, number),
        n=n,
        adapter=adapter,
    )


def bits(completions: Sequence[Completion]) -> list[tuple[bytes | str, ...]]:
    """All that must be equal where results are exact."""
    return [
        (c.tokens.tobytes(), c.logprobs.tobytes(), c.finish_reason, *(array.tobytes() for array in c.top or ()))
        for c in completions
    ]


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    """The tokens alone, which engines that are not exact must agree on too."""
    return [c.tokens.tolist() for c in completions]


def run_in_turns(engine: Engine, arrivals: list[list[GenerationRequest]]) -> dict[str, list[Completion]]:
    """Submit one batch of requests before each step, then step to the end; completions by request id."""
    events: dict[str, list[list[TokenEvent]]] = {}
    pending = list(arrivals)
    while pending or engine.busy:
        for r in pending.pop(0) if pending else []:
            events[r.request_id] = [[] for _ in range(r.n)]
            engine.submit(r)
        for event in engine.step():
            events[event.request_id][event.index].append(event)
    return {name: [completion_of(row) for row in rows] for name, rows in events.items()}


def finish(engine: Engine, events: Sequence[TokenEvent] = ()) -> dict[str, list[list[int]]]:
    """Step to the end; the tokens of every row by request id, those of `events` (seen before) first."""
    seen = list(events)
    while engine.busy:
        seen += engine.step()
    rows: dict[str, dict[int, list[int]]] = {}
    for event in seen:
        rows.setdefault(event.request_id, {}).setdefault(event.index, []).append(event.token)
    return {name: [by_index[i] for i in sorted(by_index)] for name, by_index in rows.items()}
