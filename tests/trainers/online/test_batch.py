"""Micro-batches cover every row once, within their budget."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from raylign.trainers.online.batch import micro_batches, pad, rank_batches


def test_by_hand_longest_first() -> None:
    # 9 alone would pad to 18 with another row; 5 + 4 pad to 10; 2 joins neither
    assert micro_batches([4, 9, 2, 5], 10) == [[1], [3, 0], [2]]


@pytest.mark.parametrize("budget", [1, 7, 30, 1000])
def test_every_row_once_and_no_batch_over_its_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 20, size=50).tolist()
    batches = micro_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(50))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= budget for b in batches)


def padded(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(len(b) * max(lengths[i] for i in b) for b in batches)


def test_rows_are_cut_where_padding_costs_more_than_another_batch() -> None:
    # a second batch costs 64: it pays where it saves 4 · 100 tokens of padding, and does not where it saves 4 · 15
    assert micro_batches([400, 300] * 4, 10_000) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert micro_batches([400, 385] * 4, 10_000) == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert micro_batches([], 10) == []


def test_the_cut_costs_least_of_all() -> None:
    lengths = np.random.default_rng(1).integers(50, 600, size=9).tolist()
    order = sorted(range(9), key=lambda i: (-lengths[i], i))
    every = [[order[a:b] for a, b in pairwise([0, *cut, 9])] for n in range(9) for cut in combinations(range(1, 9), n)]
    allowed = [bs for bs in every if all(padded(lengths, [b]) <= 1500 for b in bs)]
    found = micro_batches(lengths, 1500)
    assert padded(lengths, found) + 64 * len(found) == min(padded(lengths, bs) + 64 * len(bs) for bs in allowed)


def test_pad_fills_on_the_right() -> None:
    assert pad([np.array([1, 2]), np.array([3])], 3, fill=9).tolist() == [[1, 2, 9], [3, 9, 9]]


def test_ranks_have_like_tokens_as_many_forwards_and_every_row_once() -> None:
    """By hand: 9 and 2 go to the first, 5 and 4 to the second; of ten tokens a batch, and 2 with nothing to do."""
    assert rank_batches([4, 9, 2, 5], 10, 2) == [[([1], True), ([2], True)], [([3, 0], True), ([2], False)]]
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 100, 41)]
    for ranks in (1, 2, 3, 50):
        cut = rank_batches(lengths, 128, ranks)
        assert len({len(batches) for batches in cut}) == 1
        assert sorted(i for batches in cut for b in batches if b.counts for i in b.rows) == list(range(41))
        loads = [sum(lengths[i] for b in batches if b.counts for i in b.rows) for batches in cut]
        assert max(loads) - min(loads) <= max(lengths)
    assert [b.rows for b in rank_batches(lengths, 128, 1)[0]] == micro_batches(lengths, 128)
