"""Proof, where an engine runs, that a row's arithmetic does not depend on its company.

Which products round alike for different numbers of rows is a property of the processor and its libraries, so it is
measured at every start instead of being believed.
"""

from dataclasses import replace

import numpy as np

from ..cluster.errors import RunFailed
from .engine import generate
from .native.engine import NativeEngine
from .records import Completion, GenerationRequest, Sampling, SeedKey

_LENGTHS = (3, 11, 7)
"""Prompt lengths of the rows that are watched."""
_NEW_TOKENS = 12
_COMPANY = 13


def check_exactness(engine: NativeEngine) -> None:
    """Generate a few rows alone and again among others that come and go; every adapter that is loaded takes part.

    Raises `RunFailed` with what differed when tokens or log-probs are not the same bits. The engine must be idle.
    """
    if engine.busy:
        raise RunFailed("the engine cannot check itself while requests run")
    watched = [_request(engine, i, length) for i, length in enumerate(_LENGTHS)]
    alone = [generate(engine, [request])[request.request_id][0] for request in watched]
    company = [_company(engine, i) for i in range(_COMPANY)]
    half = _COMPANY // 2
    others = [*company[:half], watched[1], watched[0], *company[half:], watched[2]]
    together = generate(engine, others)
    for request, expected in zip(watched, alone, strict=True):
        _compare(request, expected, together[request.request_id][0])


def _request(engine: NativeEngine, number: int, length: int) -> GenerationRequest:
    room = max(1, min(length, engine.max_length - _NEW_TOKENS))
    adapters = (None, *engine.adapters())
    return GenerationRequest(
        request_id=f"self-check-{number}",
        prompt=(np.arange(room, dtype=np.int32) * 7 + 3 * number) % engine.vocabulary,
        sampling=Sampling(max_tokens=min(_NEW_TOKENS, engine.max_length - room)),
        seed=SeedKey(0, 0, number),
        adapter=adapters[number % len(adapters)],
    )


def _company(engine: NativeEngine, number: int) -> GenerationRequest:
    """Requests of other lengths, some with a longer cache window, some that leave early."""
    request = _request(engine, 100 + number, 2 + 5 * number)
    tokens = min(1 + 3 * (number % 5), request.sampling.max_tokens)
    return replace(request, n=1 + number % 2, sampling=replace(request.sampling, max_tokens=tokens))


def _compare(request: GenerationRequest, alone: Completion, together: Completion) -> None:
    same = alone.tokens.tobytes() == together.tokens.tobytes()
    if same and alone.logprobs.tobytes() == together.logprobs.tobytes():
        return
    length = min(len(alone.tokens), len(together.tokens))
    differs = (alone.tokens[:length] != together.tokens[:length]) | (
        alone.logprobs[:length] != together.logprobs[:length]
    )
    place = int(np.argmax(differs)) if differs.any() else length
    where = f"a prompt of {len(request.prompt)} tokens, new token {place}"
    values = (
        f"{alone.logprobs[place]!r} alone, {together.logprobs[place]!r} in company" if place < length else "lengths"
    )
    raise RunFailed(
        f"the engine's arithmetic depends on which rows run together ({where}: log-prob {values}); results would not "
        "be reproducible. Set one torch thread per engine (torch.set_num_threads(1)), or use another CPU or dtype"
    )
