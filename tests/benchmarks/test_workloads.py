"""What the benchmarks generate, and what the machine allows at most."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import limits
from benchmarks.group_prefill import possible_ratio
from benchmarks.mixed_adapters import names_for, rows_by_adapter
from benchmarks.models import SHAPES, Shape
from benchmarks.workloads import Workload, lognormal_lengths


def test_lognormal_lengths_are_the_same_every_time_and_have_the_median_and_range_asked_for() -> None:
    lengths = lognormal_lengths(4000, 64)
    np.testing.assert_array_equal(lengths, lognormal_lengths(4000, 64))
    assert abs(np.median(lengths) - 64) <= 3
    assert lengths.min() == 8
    assert lengths.max() == 256
    logs = np.log(lengths[(lengths > 8) & (lengths < 256)])
    assert 0.65 < logs.std() < 0.8, "clipping takes a little off sigma 0.8"
    assert lognormal_lengths(4, 2).min() >= 1


def test_prompts_are_new_in_every_pair_equal_on_both_sides_and_shared_in_a_group() -> None:
    work = Workload(case="c", vocabulary=50, prompt=6, lengths=(3, 3, 5, 5), group=2)
    first = work.prompts(1)
    assert first == work.prompts(1)
    assert first != work.prompts(2)
    assert first != replace(work, case="d").prompts(1)
    assert first[0] == first[1] != first[2] == first[3]
    assert {len(prompt) for prompt in first} == {6}
    assert min(min(prompt) for prompt in first) >= 3
    assert (work.useful, work.longest, work.prompts_computed) == (16, 11, 2)
    assert work.warm_up().lengths == (3, 3, 3, 3)


@pytest.mark.parametrize(("size", "low", "high"), [("1M", 0.9e6, 1.2e6), ("25M", 24e6, 27e6), ("120M", 115e6, 125e6)])
def test_models_have_the_size_of_their_name(size: str, low: float, high: float) -> None:
    assert low < SHAPES[size].parameters < high


def test_parameters_by_hand() -> None:
    shape = Shape(vocabulary=10, hidden=4, intermediate=6, layers=2, heads=2)
    attention = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4
    assert shape.parameters == 2 * (attention + 3 * 6 * 4) + 10 * 4


def test_the_limit_counts_each_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second a row of any product: 2 layers of 7 products and the output layer."""
    monkeypatch.setattr(limits, "product_seconds", lambda rows, matrix, dtype: float(rows))
    shape = Shape(vocabulary=10, hidden=4, intermediate=6, layers=2, heads=2)
    work = Workload(case="c", vocabulary=10, prompt=5, lengths=(3, 3, 4, 4), group=2)
    prefill, decode, head = 14 * 2 * 5, 14 * (14 - 4), 14
    assert limits.tokens_per_second(shape, work, "fp32", 4) == pytest.approx(14 / (prefill + decode + head))


def test_product_seconds_are_those_of_a_product() -> None:
    small = limits.product_seconds(8, (64, 64), "fp32")
    large = limits.product_seconds(64, (1024, 1024), "fp32")
    assert 0 < 20 * small < large, "2,048 times the work"


@pytest.mark.parametrize(("prompt", "completion", "group", "ratio"), [(512, 32, 8, 8 * 544 / 768), (100, 50, 1, 1.0)])
def test_possible_ratio_of_a_shared_prompt(prompt: int, completion: int, group: int, ratio: float) -> None:
    assert possible_ratio(prompt, completion, group) == ratio


def test_adapters_go_round_and_go_on_in_the_next_pair() -> None:
    assert names_for(3, 2, 0) == ["a0", "a1", "a0"]
    assert names_for(3, 2, 1) == ["a1", "a0", "a1"]
    assert len(set(names_for(32, 64, 1)) | set(names_for(32, 64, 2))) == 64
    assert rows_by_adapter(["a1", "a0", "a1"]) == {"a1": [0, 2], "a0": [1]}
