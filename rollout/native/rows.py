"""What the engine knows of a running sample, and of a prompt whose samples have not all begun."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..engine import TokenEvent
from ..records import FinishReason, GenerationRequest, TopLogprobs
from .sampling import Knobs, stream_key
from .shaping import Shaper
from .stop_strings import StopStrings

STATE = np.dtype(
    [
        ("token", np.int64),
        ("position", np.int64),
        ("adapter", np.int64),
        ("key", np.uint64),
        ("drawn", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("min_p", np.float64),
        ("top_logprobs", np.int64),
        ("shaped", np.bool_),
    ]
)
"""What a step computes with, a record a row: the last token, its place in the row, the adapter's number, the random
stream and how many numbers were taken from it, the sampling settings."""


def fresh_state(request: GenerationRequest, index: int, adapter: int) -> np.ndarray:
    """The record of a request's sample `index` before its first token is drawn."""
    sampling, seed = request.sampling, request.seed
    state = np.zeros((), STATE)
    state["position"], state["adapter"] = len(request.prompt), adapter
    state["key"], state["drawn"] = stream_key(seed._replace(sample=seed.sample + index)), request.drawn
    for name in ("temperature", "top_p", "top_k", "min_p", "top_logprobs", "shaped"):
        state[name] = getattr(sampling, name)
    return state


def knobs_of(state: np.ndarray) -> Knobs:
    """The sampling settings of some rows."""
    return Knobs(state["temperature"], state["top_p"], state["top_k"], state["min_p"], state["top_logprobs"])


@dataclass(slots=True)
class Row:
    """One running sample: whose it is, what ends it, and the blocks that hold its states."""

    request: GenerationRequest
    index: int
    strings: StopStrings | None
    blocks: list[int]
    left: int
    stop_ids: frozenset[int]
    shaper: Shaper | None = None

    def take(self, token: int, logprob: float, top: TopLogprobs | None) -> TokenEvent:
        """Count a new token and say whether it is the last."""
        self.left -= 1
        reason: FinishReason | None = None
        if self.shaper is not None:
            self.shaper.take(token)
        ended = self.shaper is not None and self.shaper.ended
        if ended or token in self.stop_ids or (self.strings is not None and self.strings.push(token)):
            reason = "stop"
        elif self.left == 0:
            reason = "length"
        return TokenEvent(self.request.request_id, self.index, token, logprob, reason, top)


@dataclass(slots=True)
class Prompt:
    """A request of which some samples have not begun, and how far its prompt is computed."""

    request: GenerationRequest
    adapter: int = -1
    done: int = 0
    """Tokens whose states are in the blocks."""
    blocks: list[int] = field(default_factory=list)
    begun: bool = False
    entered: int = 0
    """Samples that run or have run."""
    logits: torch.Tensor | None = None
    """After the last token, `[V]`, once all are computed."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Samples that have not begun."""
        return self.request.n - self.entered
