"""Advantages by hand, against the peers' formulas, and their invariances."""

from typing import Any

import numpy as np
import pytest
from raylign.trainers.online.advantages import Advantage, group_mean, leave_one_out, returns, scaled

RANDOM = np.random.default_rng(0)


def whole(rewards: Any) -> np.ndarray:
    """One reward a completion, as rewards of a single token `[N, G, 1]`."""
    return np.asarray(rewards, np.float64)[:, :, None]


def of(advantage: Advantage, rewards: Any, scale: Any) -> list[list[float]]:
    given = whole(rewards)
    return scaled(advantage(given), np.ones_like(given), scale)[:, :, 0].tolist()


def test_without_scale_it_is_the_distance_to_the_group_mean() -> None:
    got = of(group_mean, [[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]], "none")
    assert got == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others() -> None:
    # 6 − (0 + 3)/2, 0 − (6 + 3)/2, 3 − (6 + 0)/2
    assert of(leave_one_out, [[6.0, 0.0, 3.0]], "none") == [[4.5, -4.5, 0.0]]


def test_leave_one_out_is_trls_formula() -> None:
    rewards = RANDOM.normal(size=(5, 4))
    baselines = (rewards.sum(axis=1, keepdims=True) - rewards) / 3  # RLOOTrainer, where all rewards are known
    assert np.allclose(of(leave_one_out, rewards, "none"), rewards - baselines, atol=1e-12)


def test_group_scale_divides_by_the_groups_own_std() -> None:
    # std with n − 1: √2 and 10√2
    got = of(group_mean, [[0.0, 2.0], [0.0, 20.0], [4.0, 4.0]], "group")
    assert np.allclose(got, [[-(0.5**0.5), 0.5**0.5], [-(0.5**0.5), 0.5**0.5], [0, 0]])


def test_batch_scale_leaves_groups_without_variance_out_of_the_std() -> None:
    with_flat = of(group_mean, [[0.0, 2.0], [1.0, 5.0], [7.0, 7.0]], "batch")
    without = of(group_mean, [[0.0, 2.0], [1.0, 5.0]], "batch")
    # centred: −1, 1, −2, 2; Σ² = 10 over n − 1 = 3
    assert np.allclose(without, np.array([[-1, 1], [-2, 2]]) / (10 / 3) ** 0.5)
    assert np.allclose(with_flat[:2], without)
    assert with_flat[2] == [0, 0]


def test_returns_are_what_is_still_to_come() -> None:
    rewards = np.array([[[-0.1, -0.2, 1.0], [0.5, 0.0, 0.0]]])
    assert np.allclose(returns(rewards), [[[0.7, 0.8, 1.0], [0.5, 0.0, 0.0]]])


def test_rewards_of_tokens_count_as_their_sum_where_the_group_is_the_baseline() -> None:
    tokens = RANDOM.normal(size=(3, 4, 6))
    sums = tokens.sum(axis=2, keepdims=True)
    for advantage in (group_mean, leave_one_out):
        assert np.allclose(advantage(tokens), advantage(sums))


@pytest.mark.parametrize("baseline", [False, True])
def test_token_scale_is_that_of_reinforce_plus_plus(baseline: bool) -> None:
    """By loops, as its reference code has it (γ = 1): returns or rewards less their group's mean, whitened by token."""
    lengths = RANDOM.integers(1, 7, size=(3, 4))
    mask = (np.arange(6) < lengths[:, :, None]).astype(float)
    rewards = RANDOM.normal(size=mask.shape) * mask
    raw = np.zeros_like(mask)
    for n, g in np.ndindex(3, 4):
        for t in range(lengths[n, g]):
            raw[n, g, t] = sum(rewards[n, g, t:])
            if baseline:
                raw[n, g, t] = sum(rewards[n, g]) - sum(sum(rewards[n, other]) for other in range(4)) / 4
    count = mask.sum()
    mean = (raw * mask).sum() / count
    variance = ((raw - mean) ** 2 * mask).sum() / count * count / (count - 1)
    expected = (raw - mean) / (variance + 1e-8) ** 0.5 * mask
    assert np.allclose(scaled((group_mean if baseline else returns)(rewards), mask, "tokens"), expected, atol=1e-6)


@pytest.mark.parametrize("advantage", [group_mean, leave_one_out])
@pytest.mark.parametrize("scale", ["none", "batch", "group", "tokens"])
def test_a_step_without_any_variance_pushes_nothing(advantage: Advantage, scale: str) -> None:
    assert not np.any(of(advantage, np.full((3, 4), 0.3), scale))


@pytest.mark.parametrize("scale", ["none", "batch", "group", "tokens"])
def test_order_of_groups_and_samples_does_not_matter(scale: str) -> None:
    rewards = RANDOM.normal(size=(5, 4))
    order = [3, 1, 4, 0, 2]
    for advantage in (group_mean, leave_one_out):
        got = np.array(of(advantage, rewards, scale))
        assert np.allclose(of(advantage, rewards[order][:, ::-1], scale), got[order][:, ::-1])
