"""What changes single rows' logits before a token is drawn: biases, penalties for repetition, a grammar's mask.

A row's change depends on its own request and tokens alone, and touches no other row.

Shapes: V tokens of the vocabulary.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch

from ..records import GenerationRequest


class Shaper:
    """One row's biases, penalties and grammar; `ended` once the grammar allows nothing more.

    Penalties are OpenAI's: a token that the completion has c times loses `presence_penalty` + c · `frequency_penalty`.
    Tokens of the prompt do not count, but those that are the completion's own (`GenerationRequest.drawn`) do.
    """

    def __init__(self, request: GenerationRequest, matcher: Any = None) -> None:
        self.ended = False
        self._sampling = request.sampling
        self._matcher = matcher
        self._biases = dict(request.sampling.logit_bias)
        self._counts: Counter[int] = Counter()
        self._change: torch.Tensor | None = None
        own = request.prompt[len(request.prompt) - request.drawn :].tolist()
        for token in own:
            self.take(token)

    @property
    def failure(self) -> str:
        """Why the grammar cannot go on; empty where it can."""
        return self._matcher.get_error() if self._matcher is not None else ""

    @torch.inference_mode()
    def apply(self, logits_V: torch.Tensor) -> None:
        """Change a row's logits in place; what the grammar forbids becomes -inf."""
        if self._penalised or self._biases:
            if self._change is None:
                self._change = self._all_changes(logits_V)
            logits_V += self._change
        if self._matcher is not None:
            logits_V.masked_fill_(self._forbidden(len(logits_V)).to(logits_V.device), -torch.inf)

    @torch.inference_mode()
    def take(self, token: int) -> None:
        """The row's new token."""
        if self._penalised:
            self._counts[token] += 1
            if self._change is not None:
                self._change[token] = self._change_of(token)
        if self._matcher is not None:
            self._matcher.consume_token(token)
            self.ended = self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def _penalised(self) -> bool:
        return bool(self._sampling.presence_penalty or self._sampling.frequency_penalty)

    def _change_of(self, token: int) -> float:
        count, sampling = self._counts[token], self._sampling
        penalty = sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
        return self._biases.get(token, 0.0) - penalty

    def _all_changes(self, logits_V: torch.Tensor) -> torch.Tensor:
        change = np.zeros(len(logits_V), np.float32)
        for token in self._biases.keys() | self._counts.keys():
            change[token] = self._change_of(token)
        return torch.from_numpy(change).to(logits_V.device)

    def _forbidden(self, size: int) -> torch.Tensor:
        """Tokens beyond the tokenizer's are forbidden too."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        return torch.from_numpy(np.pad(~allowed, (0, size - len(allowed)), constant_values=True))
