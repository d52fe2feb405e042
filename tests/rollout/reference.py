"""What an engine's output is held against: the model's own forward and `generate`, alone and under PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from raylign.rollout.records import Completion, GenerationRequest, Sampling, TopLogprobs


class Reference:
    """A model folder, and adapter folders by digest, as transformers and PEFT run them: one row at a time."""

    def __init__(self, folder: Path, adapters: dict[str, Path] | None = None, dtype: str = "float32") -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def base() -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

        self._models: dict[str | None, Any] = {None: base()}
        for digest, path in (adapters or {}).items():
            self._models[digest] = PeftModel.from_pretrained(base(), path)

    def greedy(self, request: GenerationRequest) -> list[int]:
        """The tokens that `generate` gives without sampling, to `max_tokens`."""
        ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
        count = request.sampling.max_tokens
        out = self._models[request.adapter].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(request.prompt) :].tolist()

    def logprobs(self, request: GenerationRequest, completion: Completion) -> np.ndarray:
        """Log-probs `[T]` of a completion's tokens under the distributions that its request samples from."""
        logits = self._logits(request, completion.tokens)
        own = request.prompt[len(request.prompt) - request.drawn :].tolist()
        for t, row in enumerate(logits):
            shape(row, [*own, *completion.tokens[:t].tolist()], request.sampling)
        each = [distribution(row, request.sampling) for row in logits]
        return np.log([row[token] for row, token in zip(each, completion.tokens, strict=True)])

    def first(self, request: GenerationRequest) -> np.ndarray:
        """The distribution `[V]` float64 of the first new token."""
        return distribution(self._logits(request, np.zeros(1, np.int32))[0], request.sampling)

    def _logits(self, request: GenerationRequest, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([request.prompt, tokens]).astype(np.int64))[None]
        with torch.no_grad():
            logits = self._models[request.adapter](input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
        return logits.double().numpy()


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `sampling` draws from, by its definition: `[V]` float64 from logits `[V]`."""
    if sampling.temperature == 0:
        return _normalised(np.exp(logits - logits.max()))
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    weights[weights < sampling.min_p] = 0
    if 0 < sampling.top_k < len(weights):
        weights[weights < np.sort(weights)[-sampling.top_k]] = 0
    order = np.argsort(-weights)
    above = np.cumsum(weights[order]) - weights[order]
    weights[order[above >= sampling.top_p * weights.sum()]] = 0
    return _normalised(weights)


def shape(logits: np.ndarray, before: list[int], sampling: Sampling) -> None:
    """Biases and penalties by their definition, in place, where a completion has the tokens `before`."""
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in set(before):
        logits[token] -= sampling.presence_penalty + before.count(token) * sampling.frequency_penalty


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def chi_squared_excess(counts: np.ndarray, expected: np.ndarray) -> float:
    """How far Pearson's statistic lies above what it exceeds once in a thousand times (Wilson and Hilferty 1931).

    Tokens expected fewer than five times count as one.
    """
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(1, len(counts) - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum() - limit)


def check_top(top: TopLogprobs | None, ids: np.ndarray, logprobs: np.ndarray, tolerance: float) -> None:
    """The first token's likeliest tokens; what could not be drawn has -inf, and then its id means nothing."""
    assert top is not None
    possible = np.isfinite(logprobs)
    assert (np.isfinite(top.logprobs[0]) == possible).all()
    assert top.ids[0][possible].tolist() == ids[possible].tolist()
    assert np.abs(top.logprobs[0][possible] - logprobs[possible]).max() < tolerance
