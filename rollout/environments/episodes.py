"""The episodes of a group: after each of the policy's messages its environment answers, until all are over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import RolloutConfig
from ..records import Group, Sample
from ..rewards.functions import RewardError
from .dialogue import observation_ids, reply
from .process import EnvironmentPool
from .protocol import Message


@dataclass(frozen=True, slots=True)
class Stage:
    """What all episodes of a worker are played on."""

    config: RolloutConfig
    environment: EnvironmentPool
    tokenizer: Any
    stops: Sequence[int]


class Episodes:
    """The conversations of a group's completions, from their first message on."""

    def __init__(self, group: Group, stage: Stage) -> None:
        self._group, self._stage = group, stage
        self._tools = stage.environment.tools
        self._messages: dict[int, list[Message]] = {}

    def answer(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """Have the environment answer those whose message is new; they go on, or their episode is over."""
        over = [sample.finish_reason is not None and sample.transcript for sample in samples]
        return tuple(
            sample if done else self._answered(i, sample)
            for i, (sample, done) in enumerate(zip(samples, over, strict=True))
        )

    def _answered(self, i: int, sample: Sample) -> Sample:
        """One whose message has ended; where that was cut, the environment hears nothing of it."""
        written = np.ones(len(sample.tokens), bool) if sample.written is None else sample.written
        sample = replace(sample, written=written, environment=sample.environment or 0.0)
        if sample.finish_reason != "stop":
            return self._over(sample)
        messages = self._messages.setdefault(i, [dict(m) for m in self._group.row["prompt"]])
        messages.append(self._said(sample))
        try:
            turn = self._stage.environment.step(messages, self._group.row)
        except RewardError as error:
            return self._over(replace(sample, trouble=str(error)))
        sample = replace(sample, environment=(sample.environment or 0.0) + turn.reward)
        if turn.done:
            return self._over(sample)
        ids = observation_ids(self._stage.tokenizer, messages[-1], turn.observation, self._stage.stops, self._tools)
        room = self._stage.config.sampling.max_tokens - len(sample.tokens) - len(ids)
        if room < 1 or sample.turns == self._turns:
            return self._over(replace(sample, finish_reason="length"))
        messages += turn.observation
        return _with_observation(sample, ids)

    @property
    def _turns(self) -> int:
        assert self._stage.config.environment
        return self._stage.config.environment.turns

    def _said(self, sample: Sample) -> Message:
        """The policy's last message, by its tokens."""
        tokenizer, last = self._stage.tokenizer, sample.spans[-1].tokens
        ids, before = sample.tokens[-last:], sample.tokens[:-last]
        ids = ids[:-1] if len(ids) and ids[-1] in self._stage.stops else ids
        prompt = np.concatenate([self._group.prompt, before])
        return reply(tokenizer, tokenizer.decode(ids.tolist()), tokenizer.decode(prompt.tolist()), self._tools)

    def _over(self, sample: Sample) -> Sample:
        return replace(sample, transcript=self._stage.tokenizer.decode(sample.tokens.tolist()))


def _with_observation(sample: Sample, ids: Sequence[int]) -> Sample:
    """The sample with tokens that the policy did not draw, after which it goes on."""
    assert sample.written is not None
    return replace(
        sample,
        tokens=np.concatenate([sample.tokens, np.array(ids, np.int32)]),
        logprobs=np.concatenate([sample.logprobs, np.zeros(len(ids), np.float32)]),
        written=np.concatenate([sample.written, np.zeros(len(ids), bool)]),
        finish_reason=None,
        turns=sample.turns + 1,
    )
