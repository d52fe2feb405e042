"""From scored groups to the samples of an update, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from raylign.rollout.records import Group, Sample
from raylign.trainers.online.batch import trained
from raylign.trainers.online.experience import (
    chosen,
    further_prompts,
    has_variance,
    rewards_of,
    shaped,
    train_samples,
)
from raylign.trainers.stages import OnlineStage


def stage(**fields: Any) -> OnlineStage:
    return OnlineStage.model_validate(
        {"data": {"path": "x"}, "rewards": [{"type": "format", "pattern": "x"}], "advantage_scale": "none", **fields}
    )


def group(rewards: list[float], lengths: list[int] | None = None, **fields: Any) -> Group:
    """A group with completions of these lengths (2 tokens each by default); those of 10 tokens were cut there."""
    samples = tuple(
        Sample(
            tokens=np.full(length, 7, np.int32),
            logprobs=np.full(length, -1.0, np.float32),
            finish_reason="length" if length == 10 else "stop",
            reward=reward,
            reward_parts={"task": reward},
            reference=np.full(length, -1.5, np.float32),
        )
        for reward, length in zip(rewards, lengths or [2] * len(rewards), strict=True)
    )
    return Group(step=0, index=0, prompt=np.array([1, 2], np.int32), row={}, samples=samples, **fields)


def advantages(groups: list[Group], **fields: Any) -> list[list[float]]:
    return [s.advantages.tolist() for s in train_samples(groups, stage(**fields), 0.1)]


def test_groups_that_could_not_be_scored_are_left_out_and_those_without_variance_push_nothing() -> None:
    groups = [group([1.0, 1.0]), group([0.0, 2.0]), group([0.0, 1.0], error="the reward raised")]
    assert [has_variance(g) for g in groups] == [False, True, False]
    assert advantages(groups) == [[0, 0], [0, 0], [-1, -1], [1, 1]]
    assert advantages(groups[2:]) == []


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 2),
        ({"kl": {"coefficient": 0.1, "place": "reward", "estimator": "k1"}}, 2),
        ({"kl": {"coefficient": 0.1}}, 4),
        ({"entropy_bonus": 0.1}, 4),
        ({"type": "online_dpo"}, 1),
    ],
)
def test_samples_without_advantages_are_trained_on_where_the_loss_has_more_than_its_objective(
    fields: dict[str, Any], count: int
) -> None:
    asked = stage(**fields)
    samples = train_samples([group([1.0, 1.0]), group([0.0, 2.0])], asked, 0.1)
    assert len(trained(samples, asked)) == count


def test_samples_keep_what_the_loss_needs_in_ledger_order() -> None:
    given = [group([0.0, 2.0], [3, 1]), group([5.0, 1.0], [1, 2])]
    samples = train_samples(given, stage(), 0.0)
    assert [len(s.tokens) for s in samples] == [3, 1, 1, 2]
    assert [s.advantages.tolist() for s in samples] == [[-1, -1, -1], [1], [2], [-2, -2]]
    assert all(s.advantages.dtype == np.float32 for s in samples)
    assert samples[0].reference is not None
    assert samples[0].behaviour.tolist() == [-1, -1, -1]


def test_truncated_completions_can_be_masked_and_count_in_the_mean() -> None:
    given = [group([0.0, 1.0, 5.0], [2, 2, 10])]
    assert advantages(given, mask_truncated=True) == [[-2, -2], [-1, -1]]
    assert advantages(given)[2] == [3] * 10


def test_a_kl_in_the_reward_is_taken_off_every_token() -> None:
    kl = {"coefficient": 0.1, "place": "reward", "estimator": "k1"}
    rewards = rewards_of([group([1.0, 3.0], [3, 1])], stage(kl=kl), 0.2)
    assert np.allclose(rewards.kl_NGT, [[[0.5, 0.5, 0.5], [0.5, 0, 0]]])  # log π − log π_ref
    assert rewards.mask_NGT.tolist() == [[[1, 1, 1], [1, 0, 0]]]
    assert np.allclose(rewards.total_NG, [[0.7, 2.9]])
    in_loss = rewards_of([group([1.0, 3.0], [3, 1])], stage(kl={"coefficient": 0.1}), 0.2)
    assert in_loss.total_NG.tolist() == [[1, 3]]


def test_online_dpo_pairs_the_best_with_the_worst() -> None:
    given = [group([1.0, 3.0, 0.0, 2.0], [1, 2, 4, 1]), group([1.0] * 4), group([0.0, 5.0, 2.0], [1, 10, 3])]
    told = [(len(p.tokens), len(p.rejected.tokens)) for p in train_samples(given, stage(type="online_dpo"), 0.0)]
    assert told == [(2, 4), (10, 1)]
    masked = train_samples(given, stage(type="online_dpo", mask_truncated=True), 0.0)
    assert [(len(p.tokens), len(p.rejected.tokens)) for p in masked] == [(2, 4), (3, 1)]
    assert masked[0].reference.tolist() == [-1.5, -1.5]


def test_spin_prefers_the_datas_answer_to_every_completion_that_is_another() -> None:
    answer = np.array([7, 7, 2], np.int32)
    same = replace(group([0.0]).samples[0], tokens=answer)
    given = group([1.0, 1.0], [1, 4], answer=answer)
    given = replace(given, samples=(*given.samples, same))
    told = train_samples([given], stage(type="spin"), 0.0)
    assert [p.tokens.tolist() for p in told] == [[7, 7, 2]] * 2
    assert [len(p.rejected.tokens) for p in told] == [1, 4]
    assert all(np.isnan(p.behaviour).all() for p in told)  # no engine drew it
    with pytest.raises(ValueError, match="step 0 group 0 has no answer of the data"):
        train_samples([group([1.0])], stage(type="spin"), 0.0)


def test_reinforce_pp_gives_each_token_its_return() -> None:
    kl = {"coefficient": 0.2}
    got = [s.advantages for s in train_samples([group([1.0, 1.0], [3, 1])], stage(type="reinforce_pp", kl=kl), 0.2)]
    raw = np.array([0.7, 0.8, 0.9, 0.9])  # what is still to come at each token, all four of the batch
    assert stage(type="reinforce_pp").advantage_scale == "none"  # as this file's stages have it
    assert np.allclose(np.concatenate(got), raw)


def test_ppo_gives_each_token_an_advantage_and_a_return() -> None:
    valued = group([1.0, 3.0], [3, 1])
    rows = (np.array([0.5, 0.25, 2.0], np.float32), np.array([2.0], np.float32))
    valued = replace(valued, samples=tuple(replace(s, values=row) for s, row in zip(valued.samples, rows, strict=True)))
    asked = stage(type="ppo", kl={"coefficient": 0.2}, critic={"gamma": 1.0, "lam": 0.5})
    one, other = train_samples([valued], asked, 0.2)
    # KL 0.5 a token: rewards −0.1, −0.1, 0.9 and 2.9; δ −0.35, 1.65, −1.1 and 0.9
    assert np.allclose(one.advantages, [-0.35 + 0.5 * 1.1, 1.65 - 0.5 * 1.1, -1.1])
    assert np.allclose(other.advantages, [0.9])
    assert np.allclose(one.returns, [0.7, 1.35, 0.9])
    assert np.allclose(other.returns, [2.9])
    assert one.values.tolist() == [0.5, 0.25, 2.0]
    assert one.returns.dtype == one.advantages.dtype == np.float32

    whitened = train_samples([valued], asked.model_copy(update={"advantage_scale": "tokens"}), 0.2)
    together = np.concatenate([s.advantages for s in whitened])
    assert (together.mean(), together.std(ddof=1)) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert np.allclose(whitened[0].returns, one.returns)  # the critic learns what came, not what is whitened


def test_a_kl_without_a_reference_is_an_error() -> None:
    bare = group([1.0, 2.0])
    samples = tuple(
        Sample(tokens=s.tokens, logprobs=s.logprobs, finish_reason="stop", reward=1.0) for s in bare.samples
    )
    without = Group(step=0, index=0, prompt=bare.prompt, row={}, samples=samples)
    with pytest.raises(ValueError, match="no log-probs of the reference"):
        rewards_of([without], stage(kl={"place": "reward"}), 0.1)


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (6, 0.0), (7, -0.125), (8, -0.25), (10, -0.5)])
def test_overlong_completions_lose_reward_bit_by_bit(length: int, expected: float) -> None:
    asked = stage(overlong={"buffer": 4, "penalty": 0.5}, rollout={"sampling": {"max_tokens": 10}})
    failed = group([0.0], [10], error="the reward raised")
    (got, untouched) = shaped([group([3.0], [length]), failed], asked)
    assert got.samples[0].reward == 3.0 + expected
    assert got.samples[0].reward_parts == {"task": 3.0, "overlong": expected}
    assert untouched is failed


def test_the_buffer_is_a_fifth_of_the_length_and_off_by_default() -> None:
    asked = stage(overlong={}, rollout={"sampling": {"max_tokens": 20}})
    assert [s.reward for s in shaped([group([1.0] * 3, [16, 17, 20])], asked)[0].samples] == [1.0, 0.75, 0.0]
    given = [group([1.0], [256])]
    assert shaped(given, stage()) == given


def test_dynamic_sampling_takes_the_first_with_variance() -> None:
    flat, broken, good = group([1.0, 1.0]), group([1.0, 0.0], error="x"), group([1.0, 0.0])
    drawn = [flat, good, broken, good, flat, good]
    asked = stage(dynamic_sampling={}, batch_size=4, rollout={"group_size": 2})
    assert [id(g) for g in chosen(drawn, asked)] == [id(good)] * 2
    assert len(chosen(drawn, stage(batch_size=4, rollout={"group_size": 2}))) == 6


@pytest.mark.parametrize(
    ("wanted", "found", "drawn", "limit", "expected"),
    [
        (16, 16, 16, 160, 0),
        (16, 20, 32, 160, 0),
        (16, 12, 16, 160, 6),  # 4 missing, three in four have variance
        (16, 2, 16, 160, 16),  # 112 would be likely to do, 16 at once at most
        (16, 0, 16, 160, 16),
        (16, 3, 155, 160, 5),  # what the limit leaves
        (16, 3, 160, 160, 0),
        (16, 3, 16, 16, 0),  # without dynamic sampling
    ],
)
def test_how_many_further_prompts(wanted: int, found: int, drawn: int, limit: int, expected: int) -> None:
    assert further_prompts(wanted, found, drawn, limit) == expected
