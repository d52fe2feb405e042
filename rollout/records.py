"""What crosses between controller, rollout, reward and policy: small frozen records of arrays and numbers that pickle.

Shapes: P prompt tokens, T completion tokens.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]

MAX_TOP_LOGPROBS = 20
"""The most `top_logprobs` a request may ask for, as OpenAI's API and vLLM have it."""


class SeedKey(NamedTuple):
    """Where a sample's random numbers come from: never a worker, a slot or an arrival order."""

    run_seed: int
    step: int
    prompt: int
    sample: int = 0


class TopLogprobs(NamedTuple):
    """The likeliest tokens, `[n]` each for one new token, `[T, n]` for a completion: `ids` int32 and their `logprobs`
    float32 under the distribution that was sampled, best first, equals by id; what could not be drawn has -inf."""

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 is greedy, `top_k` 0 and `min_p` 0 keep all.

    Log-probs are those of the distribution the token was drawn from; greedy ones are the model's own (temperature 1).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Least probability of a token, as a share of the best one's."""
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    """How many of the likeliest tokens to report with every token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits, before anything else."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the completion has already."""
    frequency_penalty: float = 0.0
    """Taken from it as often as the completion has it."""
    grammar: str = ""
    """A grammar in llguidance's notation that the completion's text follows; none for any text."""

    @property
    def shaped(self) -> bool:
        """Whether the model's logits are changed before a token is drawn."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty or self.grammar)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt `[P]` int32 and how many completions to draw from it; the prompt is prefilled once."""

    request_id: str
    prompt: np.ndarray
    sampling: Sampling
    seed: SeedKey
    n: int = 1
    adapter: str | None = None
    """Digest of a loaded adapter, or none for the base model."""
    drawn: int = 0
    """How many tokens at the prompt's end are the completion's own, drawn before: its random numbers follow theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one row generated: `tokens` `[T]` int32 (stop token included) and, for each, the log-prob `[T]` float32
    under the distribution it was sampled from."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    top: TopLogprobs | None = None
    """`[T, n]`, where the request asked for `n` top log-probs."""


class Span(NamedTuple):
    """So many tokens of a completion that follow each other, and the weights that drew them."""

    tokens: int
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of a prompt, with the weights that made it: `tokens` `[T]` int32 and, for each, the log-prob
    `[T]` float32 under the distribution of the weights that drew it."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason | None
    """None while more is to be drawn."""
    spans: tuple[Span, ...] = ()
    """Which weights drew which tokens, in their order: several where it was carried from step to step."""
    written: np.ndarray | None = None
    """Which tokens `[T]` the policy drew, where an environment put observations between them; none for all."""
    turns: int = 1
    """Messages of the policy."""
    environment: float | None = None
    """What an environment gave for its turns."""
    trouble: str = ""
    """What was wrong with the environment, which ended the episode."""
    text: str = ""
    """The policy's last message."""
    transcript: str = ""
    """All of an episode, where there is an environment."""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    reference: np.ndarray | None = None
    """Log-probs `[T]` under the reference, where there is one."""
    values: np.ndarray | None = None
    """What the critic expects still to come at each token, `[T]`, where there is a critic."""

    @property
    def drawn(self) -> int:
        """How many tokens the policy drew."""
        return len(self.tokens) if self.written is None else int(self.written.sum())


class Origin(NamedTuple):
    """Where a group was drawn, which its random numbers come from: the step, its place there, its row of the data."""

    step: int
    index: int
    row: int


class Draw(NamedTuple):
    """How many completions a group gets and at which temperature, where that is not as a stage's rollouts are drawn."""

    samples: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and its G completions: the unit of dispatch, retry and accounting."""

    step: int
    index: int
    """Place in the step's batch; batches are put together in this order, never in order of arrival."""
    prompt: np.ndarray
    row: dict[str, Any]
    answer: np.ndarray | None = None
    """The data's own completion `[T]` int32, where a stage learns from it."""
    origin: Origin | None = None
    """None for this step and this place."""
    draw: Draw | None = None
    """None for the recipe's group size and sampling."""
    budget: int | None = None
    """How many tokens each completion may get now; what is not finished then is carried to the next step."""
    samples: tuple[Sample, ...] = ()
    version: int = 0
    """Of the weights that drew last."""
    digest: str = ""
    worker: str = ""
    start: float = 0.0
    """When its worker began it, seconds since the epoch."""
    seconds: float = 0.0
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether none of its completions is to get more tokens."""
        return all(sample.finish_reason for sample in self.samples)
