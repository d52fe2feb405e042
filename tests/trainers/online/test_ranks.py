"""A policy and a critic of two ranks in two processes against those of one, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rank_process import Group, samples, spec, train

FULL, LORA = {"adapter": None}, {"adapter": {"r": 4}}


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.close()


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    assert list(ours) == list(theirs)
    gaps = sum(float(((ours[n] - theirs[n]).astype(np.float64) ** 2).sum()) for n in theirs)
    return (gaps / sum(float((theirs[n].astype(np.float64) ** 2).sum()) for n in theirs)) ** 0.5


@pytest.mark.parametrize("trained", [LORA, FULL], ids=["lora", "full"])
def test_two_ranks_have_the_gradient_of_one(trained: dict[str, Any], pair: Group, tiny_model: Path) -> None:
    given = spec(tiny_model, **trained, micro_batch_tokens=12, entropy_bonus=0.1)
    for updates in ([samples()], [samples()] * 2):
        alone = train(None, given, updates)
        first, second = pair.do(train, spec=given, updates=updates)
        assert distance(first["gradient"], alone["gradient"]) < 1e-6 * 20 ** (len(updates) - 1)
        assert distance(first["weights"], alone["weights"]) < 1e-5
        assert first["metrics"] == second["metrics"]
        for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert second["weights"] == {}
