"""Advantages by hand, against the peers' formulas, and their invariances."""

from typing import Any

import numpy as np
import pytest
from raylign.trainers.online.advantages import (
    Advantage,
    Rewards,
    gae,
    group_mean,
    leave_one_out,
    returns,
    scaled,
)

RANDOM = np.random.default_rng(0)


def whole(rewards: Any) -> Rewards:
    """Completions of one token each, without a KL."""
    task = np.asarray(rewards, np.float64)
    return Rewards(task, np.zeros((*task.shape, 1)), np.ones((*task.shape, 1)), 0.0)


def random(coefficient: float = 0.2) -> Rewards:
    """Three groups of four completions with 1 to 6 tokens and a KL."""
    mask = (np.arange(6) < RANDOM.integers(1, 7, size=(3, 4))[:, :, None]).astype(float)
    return Rewards(RANDOM.normal(size=(3, 4)), RANDOM.normal(size=mask.shape) * mask, mask, coefficient)


def of(advantage: Advantage, rewards: Any, scale: Any) -> list[list[float]]:
    given = whole(rewards)
    return scaled(advantage(given), given.mask_NGT, scale)[:, :, 0].tolist()


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
    kl, mask = np.array([[[0.5, 1.0, 1.0], [2.0, 0, 0]]]), np.array([[[1, 1, 1], [1, 0, 0]]])
    got = returns(Rewards(np.array([[1.0, 0.5]]), kl, mask, 0.1))
    assert np.allclose(got, [[[0.75, 0.8, 0.9], [0.3, 0, 0]]])


def test_a_completions_kl_counts_as_its_sum_where_the_group_is_the_baseline() -> None:
    given = random()
    totals = given.task_NG - 0.2 * given.kl_NGT.sum(axis=2)  # as TRL's RLOO has it
    for advantage in (group_mean, leave_one_out):
        assert np.allclose(advantage(given)[:, :, 0], of(advantage, totals, "none"))


@pytest.mark.parametrize("baseline", [False, True])
def test_token_scale_is_that_of_reinforce_plus_plus(baseline: bool) -> None:
    """By loops, as its reference code has it (γ = 1): returns or rewards less their group's mean, whitened by token."""
    given = random()
    mask, raw = given.mask_NGT, np.zeros_like(given.mask_NGT)
    for n, g in np.ndindex(3, 4):
        for t in range(int(mask[n, g].sum())):
            raw[n, g, t] = given.task_NG[n, g] - 0.2 * sum(given.kl_NGT[n, g, t:])
            if baseline:
                totals = [given.task_NG[n, o] - 0.2 * sum(given.kl_NGT[n, o]) for o in range(4)]
                raw[n, g, t] = totals[g] - sum(totals) / 4
    count = mask.sum()
    mean = (raw * mask).sum() / count
    variance = ((raw - mean) ** 2 * mask).sum() / count * count / (count - 1)
    expected = (raw - mean) / (variance + 1e-8) ** 0.5 * mask
    got = scaled((group_mean if baseline else returns)(given), mask, "tokens")
    assert np.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("advantage", [group_mean, leave_one_out])
@pytest.mark.parametrize("scale", ["none", "batch", "group", "tokens"])
def test_a_step_without_any_variance_pushes_nothing(advantage: Advantage, scale: str) -> None:
    assert not np.any(of(advantage, np.full((3, 4), 0.3), scale))


@pytest.mark.parametrize("scale", ["batch", "group", "tokens"])
def test_rounding_is_not_blown_up_into_a_signal(scale: str) -> None:
    got = np.array(of(group_mean, [[0.5, 0.5 + 1e-9, 0.5]], scale))
    assert 0 < np.abs(got).max() < 1e-4


@pytest.mark.parametrize("scale", ["none", "batch", "group", "tokens"])
def test_order_of_groups_and_samples_does_not_matter(scale: str) -> None:
    rewards = RANDOM.normal(size=(5, 4))
    order = [3, 1, 4, 0, 2]
    for advantage in (group_mean, leave_one_out):
        got = np.array(of(advantage, rewards, scale))
        assert np.allclose(of(advantage, rewards[order][:, ::-1], scale), got[order][:, ::-1])


def test_gae_by_hand() -> None:
    """γ = 0.5, λ = 0.5: completions of two tokens and of three, values 1, 2 and 1, 2, 3."""
    values = np.array([[[1.0, 2.0, 99.0], [1.0, 2.0, 3.0]]])
    mask = np.array([[[1, 1, 0], [1, 1, 1]]])
    given = Rewards(np.array([[1.0, 3.0]]), np.zeros(mask.shape), mask, 0.1, values, gamma=0.5, lam=0.5)
    # δ: 0 + 1 − 1, 1 − 2 and 0 + 1 − 1, 0 + 1.5 − 2, 3 − 3; a quarter of the next advantage goes on
    assert gae(given).tolist() == [[[-0.25, -1.0, 0.0], [-0.125, -0.5, 0.0]]]
    # a KL of 1 at the first token of the one and at the last of the other takes 0.5 off the reward there
    kl = np.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    got = gae(given._replace(kl_NGT=kl, kl_coefficient=0.5))
    assert got.tolist() == [[[-0.75, -1.0, 0.0], [-0.15625, -0.625, -0.5]]]


def critics(gamma: float, lam: float) -> Rewards:
    """Random rewards, KL and values; what stands at masked places is no number."""
    given = random()
    values = np.where(given.mask_NGT > 0, RANDOM.normal(size=given.mask_NGT.shape), np.nan)
    return given._replace(values_NGT=values, gamma=gamma, lam=lam)


def test_gae_is_the_papers_sum() -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the completion, with InstructGPT's rewards, by loops."""
    given = critics(0.9, 0.8)
    assert given.values_NGT is not None
    expected = np.zeros(given.mask_NGT.shape)
    for n, g in np.ndindex(3, 4):
        length = int(given.mask_NGT[n, g].sum())
        reward = [-0.2 * given.kl_NGT[n, g, t] for t in range(length)]
        reward[-1] += given.task_NG[n, g]
        value = [*given.values_NGT[n, g, :length], 0.0]
        delta = [reward[t] + 0.9 * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected[n, g, t] = sum((0.9 * 0.8) ** k * delta[t + k] for k in range(length - t))
    assert np.allclose(gae(given), expected, atol=1e-12)


def test_gae_at_its_ends() -> None:
    """λ = 1 is the return less the value; so with values of 0 it is REINFORCE++."""
    given = critics(1.0, 1.0)
    assert given.values_NGT is not None
    assert np.allclose(gae(given), returns(given) - np.nan_to_num(given.values_NGT))
    assert np.allclose(gae(given._replace(values_NGT=np.zeros(given.mask_NGT.shape))), returns(given))


def test_gae_without_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a critic's values"):
        gae(random())
