"""The rows a vLLM engine has running: what each asks vLLM for, and what vLLM's outputs become."""

# pyright: reportMissingImports=false

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...cluster.errors import InputError
from ..engine import TokenEvent
from ..native.sampling import random_bits, stream_key
from ..native.stop_strings import StopStrings
from ..records import FinishReason, GenerationRequest, TopLogprobs

LEAST_TEMPERATURE = 0.01
"""vLLM itself would take this one for any below it, and say nothing."""


class Diverged(ValueError):
    """A row's log-prob is not a finite number."""


class Row:
    """One running sample: what ends it, and whose it is."""

    __slots__ = ("adapter", "index", "request_id", "stop_ids", "strings", "top")

    def __init__(self, request: GenerationRequest, index: int, strings: StopStrings | None) -> None:
        self.request_id = request.request_id
        self.index = index
        self.adapter = request.adapter
        self.top = request.sampling.top_logprobs
        self.stop_ids = frozenset(request.sampling.stop_token_ids)
        self.strings = strings

    def take(self, output: Any) -> Iterator[TokenEvent]:
        """The tokens of one of vLLM's outputs, up to the row's last. Raises `Diverged`."""
        places = zip(output.token_ids, output.logprobs, strict=True)
        for number, (token, logprobs) in enumerate(places, 1):
            logprob = logprobs[token].logprob
            if not math.isfinite(logprob):
                raise Diverged
            last = number == len(output.token_ids)
            reason = self._ends(token, output.finish_reason if last else None)
            yield TokenEvent(self.request_id, self.index, token, logprob, reason, self._likeliest(logprobs))
            if reason:
                return

    def _ends(self, token: int, reason: str | None) -> FinishReason | None:
        if token in self.stop_ids or (self.strings is not None and self.strings.push(token)):
            return "stop"
        return "length" if reason == "length" else None

    def _likeliest(self, logprobs: dict[int, Any]) -> TopLogprobs | None:
        if not self.top:
            return None
        best = sorted((-entry.logprob, token) for token, entry in logprobs.items())[: self.top]
        return TopLogprobs(
            np.array([token for _, token in best], np.int32), np.array([-value for value, _ in best], np.float32)
        )


def sampling_params(request: GenerationRequest, index: int) -> Any:
    """How vLLM draws one sample. Its seed comes from where the sample stands, and from nothing else.

    Raises `InputError` for settings that vLLM does not take (a temperature above 2, or too small a one).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = request.sampling
    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        raise InputError(
            f"request {request.request_id!r}: vLLM draws at temperatures from {LEAST_TEMPERATURE} on (or 0, greedy), "
            f"not at {sampling.temperature}"
        )
    if sampling.grammar:
        raise InputError(f"request {request.request_id!r} asks for a grammar: the engine vllm has none, native has")
    if request.drawn and (sampling.presence_penalty or sampling.frequency_penalty):
        raise InputError(
            f"request {request.request_id!r} goes on with penalties: vLLM would not count its {request.drawn} tokens"
        )
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=sampling.top_logprobs,
            logit_bias=dict(sampling.logit_bias) or None,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=_seed(request, index),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except VLLMValidationError as error:
        raise InputError(f"request {request.request_id!r}: vLLM refuses its sampling: {error}") from None


def _seed(request: GenerationRequest, index: int) -> int:
    """A row that goes on gets another generator than the one that drew what it has."""
    key = stream_key(request.seed._replace(sample=request.seed.sample + index))
    if request.drawn:
        key = int(random_bits(np.array([key], np.uint64), np.array([request.drawn], np.uint64))[0])
    return key >> 1
