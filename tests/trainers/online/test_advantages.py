"""Advantages by hand."""

import numpy as np
import pytest
from raylign.trainers.online.advantages import group_advantages


def test_without_scale_it_is_the_distance_to_the_group_mean() -> None:
    advantages, varies = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]), "none")
    assert advantages.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]
    assert varies.tolist() == [True, False]


def test_group_scale_divides_by_the_groups_own_std() -> None:
    advantages, _ = group_advantages(np.array([[0.0, 2.0], [0.0, 20.0]]), "group")
    # std with n − 1: √2 and 10√2
    assert np.allclose(advantages, [[-(0.5**0.5), 0.5**0.5], [-(0.5**0.5), 0.5**0.5]])


def test_batch_scale_leaves_groups_without_variance_out_of_the_std() -> None:
    with_flat, _ = group_advantages(np.array([[0.0, 2.0], [1.0, 5.0], [7.0, 7.0]]), "batch")
    without, _ = group_advantages(np.array([[0.0, 2.0], [1.0, 5.0]]), "batch")
    # centred: −1, 1, −2, 2; Σ² = 10 over n − 1 = 3
    assert np.allclose(without, np.array([[-1, 1], [-2, 2]]) / (10 / 3) ** 0.5)
    assert np.allclose(with_flat[:2], without)
    assert with_flat[2].tolist() == [0, 0]


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_a_step_without_any_variance_pushes_nothing(scale: str) -> None:
    advantages, varies = group_advantages(np.full((3, 4), 0.3), scale)
    assert not advantages.any()
    assert not varies.any()


def test_order_of_groups_and_samples_does_not_matter() -> None:
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    order = [3, 1, 4, 0, 2]
    advantages, _ = group_advantages(rewards, "batch")
    shuffled, _ = group_advantages(rewards[order][:, ::-1], "batch")
    assert np.allclose(shuffled, advantages[order][:, ::-1])
