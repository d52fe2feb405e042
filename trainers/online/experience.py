"""From the scored groups of a step to the samples of its update: pure functions, in the order of the ledger.

Shapes: N groups, G completions a group, T completion tokens (of the longest, where an array holds several).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ...rollout.records import Group, Sample
from ..stages import Estimator, OnlineStage
from . import advantages
from .advantages import Rewards
from .batch import TrainSample


def has_variance(group: Group) -> bool:
    """Whether the completions of a group were worth different rewards; one that could not be scored has none."""
    return not group.error and len({s.reward for s in group.samples}) > 1


def further_prompts(wanted: int, found: int, drawn: int, limit: int) -> int:
    """How many prompts to draw so that `wanted` groups with variance come together, after `drawn` gave `found`.

    As many as are missing, divided by the share that had variance so far; at most `wanted` at once and `limit` in all.
    """
    missing = max(0, wanted - found)
    likely = math.ceil(missing * drawn / found) if found else wanted
    return min(likely, wanted, limit - drawn)


def chosen(drawn: Sequence[Group], stage: OnlineStage) -> list[Group]:
    """The groups that an update may learn from: all, or with dynamic sampling the first that have variance."""
    if not stage.dynamic_sampling:
        return list(drawn)
    return [g for g in drawn if has_variance(g)][: stage.prompts_per_step]


def shaped(groups: Sequence[Group], stage: OnlineStage) -> list[Group]:
    """Groups whose long completions lose reward, where the stage asks for it (DAPO 2503.14476, section 3.4).

    Linear in the last tokens of the buffer, from 0 to −penalty at `max_tokens`; a reward part of its own, `overlong`.
    """
    if not stage.overlong:
        return list(groups)
    buffer, penalty = stage.overlong_buffer, stage.overlong.penalty
    free = stage.rollout.sampling.max_tokens - buffer

    def punished(sample: Sample) -> Sample:
        part = -penalty * max(0, len(sample.tokens) - free) / buffer
        parts = sample.reward_parts | {"overlong": part}
        return replace(sample, reward=(sample.reward or 0.0) + part, reward_parts=parts)

    return [g if g.error else replace(g, samples=tuple(map(punished, g.samples))) for g in groups]


def every_sample(groups: Sequence[Group]) -> list[TrainSample]:
    """All completions in order, as reference and critic take them."""
    none = np.zeros(0, np.float32)
    return [_train_sample(g, i, none) for g in groups for i in range(len(g.samples))]


def annotated(
    groups: Sequence[Group], field: Literal["reference", "values"], given: Iterable[np.ndarray]
) -> list[Group]:
    """The groups with what a role gave for `every_sample` of them."""
    rows = iter(given)
    return [replace(g, samples=tuple(replace(s, **{field: next(rows)}) for s in g.samples)) for g in groups]


def _train_sample(group: Group, i: int, advantages_T: np.ndarray) -> TrainSample:
    """The i-th completion of a group as the roles take it; advantages `[T]`."""
    sample = group.samples[i]
    return TrainSample(
        prompt=group.prompt,
        tokens=sample.tokens,
        behaviour=sample.logprobs,
        advantages=advantages_T.astype(np.float32),
        reference=sample.reference,
        values=sample.values,
        written=sample.written,
    )


def train_samples(groups: Sequence[Group], stage: OnlineStage, kl_coefficient: float) -> list[TrainSample]:
    """What the update is over: the samples of groups without an error.

    Those whose advantages are all 0 are among them: they count in what the loss is divided by, though the update may
    leave them out (`batch.trained`). Completions cut at `max_tokens` are not, where the stage masks them. For the loss
    `preference` they are pairs.
    """
    sound = [g for g in groups if not g.error]
    if not sound:
        return []
    if stage.loss == "preference":
        return [pair for g in sound for pair in pairs(g, stage)]
    rewards = rewards_of(sound, stage, kl_coefficient)
    raw_NGt = getattr(advantages, stage.advantage)(rewards)
    pushes_NGT = np.broadcast_to(
        advantages.scaled(raw_NGt, rewards.mask_NGT, stage.advantage_scale), rewards.mask_NGT.shape
    )
    returns_NGT = None if rewards.values_NGT is None else raw_NGt + rewards.values_NGT

    def made(n: int, i: int) -> TrainSample:
        length = len(sound[n].samples[i].tokens)
        sample = _train_sample(sound[n], i, pushes_NGT[n, i, :length])
        return sample if returns_NGT is None else replace(sample, returns=returns_NGT[n, i, :length].astype(np.float32))

    return [
        made(n, i)
        for n, group in enumerate(sound)
        for i, sample in enumerate(group.samples)
        if not (stage.mask_truncated and sample.finish_reason == "length")
    ]


def pairs(group: Group, stage: OnlineStage) -> list[TrainSample]:
    """The best completion of a group before its worst (online DPO 2402.04792), where their rewards differ.

    With demonstrations the data's answer before each completion that is another (SPIN 2401.01335). Raises `ValueError`
    where the group has none.
    """
    none, samples = np.zeros(0, np.float32), group.samples
    usable = [i for i, s in enumerate(samples) if not (stage.mask_truncated and s.finish_reason == "length")]
    if stage.demonstrations:
        if group.answer is None:
            raise ValueError(f"step {group.step} group {group.index} has no answer of the data to learn from")
        unknown = np.full(len(group.answer), np.nan, np.float32)
        answer = TrainSample(prompt=group.prompt, tokens=group.answer, behaviour=unknown, advantages=none)
        others = [i for i in usable if not np.array_equal(samples[i].tokens, group.answer)]
        return [replace(answer, rejected=_train_sample(group, i, none)) for i in others]
    if not usable:
        return []
    worth = [samples[i].reward or 0.0 for i in usable]
    best, worst = usable[int(np.argmax(worth))], usable[int(np.argmin(worth))]
    if best == worst:
        return []
    return [replace(_train_sample(group, best, none), rejected=_train_sample(group, worst, none))]


def rewards_of(groups: Sequence[Group], stage: OnlineStage, kl_coefficient: float) -> Rewards:
    """What the groups' completions were worth, their KL where the stage takes it off the reward, the critic's values
    where there is one.

    The KL's log-probs are the engine's, which drew the tokens.
    """
    size, longest = len(groups[0].samples), max(len(s.tokens) for g in groups for s in g.samples)
    task_NG = np.array([[s.reward for s in g.samples] for g in groups], np.float64)
    kl_NGT, mask_NGT, values_NGT = np.zeros((3, len(groups), size, longest))
    for n, group in enumerate(groups):
        for i, sample in enumerate(group.samples):
            mask_NGT[n, i, : len(sample.tokens)] = 1 if sample.written is None else sample.written
            if stage.kl and stage.kl.place == "reward":
                kl_NGT[n, i, : len(sample.tokens)] = _kl(sample, stage.kl.estimator)
            if stage.critic:
                values_NGT[n, i, : len(sample.tokens)] = sample.values
    rewards = Rewards(task_NG, kl_NGT, mask_NGT, kl_coefficient)
    if stage.critic:
        return rewards._replace(values_NGT=values_NGT, gamma=stage.critic.gamma, lam=stage.critic.lam)
    return rewards


def _kl(sample: Sample, estimator: Estimator) -> np.ndarray:
    """Per-token estimates `[T]` of the KL to the reference. Raises `ValueError` where there is none."""
    import torch

    from .losses import kl_penalty

    if sample.reference is None:
        raise ValueError("the reward has a KL term, but a sample has no log-probs of the reference")
    behaviour, reference = torch.tensor(sample.logprobs).double(), torch.tensor(sample.reference).double()
    return kl_penalty(behaviour, reference, estimator).numpy()
