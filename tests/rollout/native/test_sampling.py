"""Random numbers by counter, and sampling by the inverse CDF."""

import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from raylign.rollout.native.sampling import Drawn, Knobs, draw, random_bits, stream_key, uniforms
from raylign.rollout.native.sampling_device import draw_on_device
from raylign.rollout.records import MAX_TOP_LOGPROBS, SeedKey

DRAWS = {"kernel": draw, "device": draw_on_device}


@pytest.fixture(params=DRAWS)
def drawn(request: pytest.FixtureRequest) -> Callable[..., Drawn]:
    """How rows are drawn on a CPU, and how on an accelerator (torch's operations, which run here as well)."""
    return DRAWS[request.param]


def knobs(
    n: int,
    temperature: Any = 1.0,
    top_p: Any = 1.0,
    top_k: Any = 0,
    min_p: Any = 0.0,
    top_logprobs: Any = 0,
) -> Knobs:
    return Knobs(*(np.resize(value, n) for value in (temperature, top_p, top_k, min_p, top_logprobs)))


def some(settings: Knobs, rows: slice) -> Knobs:
    return Knobs(*(getattr(settings, knob.name)[rows] for knob in fields(Knobs)))


def normal(n: int, vocabulary: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def streams(n: int, position: int = 0) -> np.ndarray:
    keys = np.array([stream_key(SeedKey(0, 0, i)) for i in range(n)], np.uint64)
    return uniforms(keys, np.full(n, position, np.uint64))


def test_random_bits_are_splitmix64():
    # The reference implementation's first outputs for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    keys, positions = np.full(4, 1234567, np.uint64), np.arange(4, dtype=np.uint64)
    assert random_bits(keys, positions).tolist() == expected


def test_uniforms_are_uniform_and_uncorrelated_between_samples_and_positions():
    keys = np.array([stream_key(SeedKey(7, 0, 3, sample)) for sample in range(400)], np.uint64)
    table = np.stack([uniforms(keys, np.full(400, p, np.uint64)) for p in range(200)])
    assert table.min() >= 0
    assert table.max() < 1
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 160  # chi-squared, 99 degrees: above 149 once in a thousand
    for other in (table[1:, :], table[:, 1:]):
        same = table[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.015


def test_every_field_of_the_key_counts_and_its_place_too():
    keys = {stream_key(SeedKey(*fields)) for fields in itertools.product(range(5), repeat=4)}
    assert len(keys) == 5**4


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"top_k": 3}, [0.5, 0.25, 0.15, 0]),
        ({"top_p": 0.7}, [0.5, 0.25, 0, 0]),
        ({"min_p": 0.25}, [0.5, 0.25, 0.15, 0]),
        # Min-p comes first: 0.5 of the remaining 0.9 is 56 %, short of 80 %; with 0.25 it is 83 %.
        ({"min_p": 0.25, "top_p": 0.8}, [0.5, 0.25, 0, 0]),
        # Top-k comes before top-p: 0.5 of the remaining 0.75 holds 66 %.
        ({"top_k": 2, "top_p": 0.66}, [0.5, 0, 0, 0]),
        # 0.25 at half the temperature is a quarter as likely as 0.5, not half as likely.
        ({"temperature": 0.5, "min_p": 0.3}, [0.25, 0, 0, 0]),
    ],
)
def test_frequencies_and_logprobs_are_those_of_what_the_filters_leave(
    drawn: Callable[..., Drawn], settings: dict[str, Any], kept: list[float]
):
    n, expected = 20_000, np.array(kept) / sum(kept)
    result = drawn(torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(n, 4), knobs(n, **settings), streams(n))
    counts, possible = np.bincount(result.tokens, minlength=4), expected > 0
    assert not counts[~possible].any()
    # Chi-squared with at most 3 degrees of freedom: above 16.3 once in a thousand.
    assert ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum() < 16.3
    assert np.abs(np.exp(result.logprobs) - expected[result.tokens]).max() < 1e-6


def test_greedy_takes_the_best_token_and_its_plain_logprob_whatever_the_other_knobs(drawn: Callable[..., Drawn]):
    logits = normal(16, 300, 2)
    result = drawn(logits, knobs(16, temperature=0, top_p=0.3, top_k=2, min_p=0.9, top_logprobs=3), streams(16))
    expected = torch.log_softmax(logits, -1)
    assert result.tokens.tolist() == logits.argmax(-1).tolist()
    assert np.abs(result.logprobs - expected.max(-1).values.numpy()).max() < 1e-5
    assert result.top is not None
    assert result.top.ids.tolist() == expected.topk(3).indices.tolist()
    assert np.abs(result.top.logprobs - expected.topk(3).values.numpy()).max() < 1e-5


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [(0, 5, 1.0), (0, 0, 0.6), (0, 7, 0.5), (0, 0, 0.999999), (0.05, 0, 1.0), (0.3, 4, 1.0), (0.02, 6, 0.7)],
)
def test_filters_keep_what_transformers_keeps(
    drawn: Callable[..., Drawn], vocabulary: int, min_p: float, top_k: int, top_p: float
):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    n, logits = 32, normal(32, vocabulary, 3, 2.0)
    ids: Any = None
    kept = TemperatureLogitsWarper(0.8)(ids, logits)
    if min_p:
        kept = MinPLogitsWarper(min_p)(ids, kept)
    if top_k:
        kept = TopKLogitsWarper(top_k)(ids, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(ids, kept)
    expected = torch.log_softmax(kept, -1)
    for position in range(5):
        result = drawn(logits, knobs(n, 0.8, top_p, top_k, min_p, MAX_TOP_LOGPROBS), streams(n, position))
        taken = expected[torch.arange(n), torch.from_numpy(result.tokens)].numpy()
        assert np.abs(result.logprobs - taken).max() < 1e-5
        assert result.top is not None
        best = expected.topk(MAX_TOP_LOGPROBS).values.numpy()
        assert (np.isfinite(result.top.logprobs) == np.isfinite(best)).all()
        finite = np.isfinite(best)
        assert np.abs(result.top.logprobs[finite] - best[finite]).max() < 1e-5
        of_ids = expected.gather(1, torch.from_numpy(result.top.ids.astype(np.int64))).numpy()
        assert np.abs(of_ids[finite] - best[finite]).max() < 1e-5


def test_the_token_is_the_first_whose_running_sum_exceeds_the_uniform():
    logits = normal(1, 3000, 8)
    sums = torch.softmax(logits[0].double(), -1).cumsum(0).numpy()
    uniform = (np.arange(2000) + 0.5) / 2000
    tokens = draw(logits.expand(2000, -1), knobs(2000), uniform).tokens
    assert np.abs(tokens - np.searchsorted(sums, uniform, side="right")).max() <= 1  # sums of float32 weights
    assert (tokens == np.searchsorted(sums, uniform, side="right")).mean() > 0.999


@pytest.mark.parametrize("vocabulary", [25, 1024, 1025, 30_000])
def test_a_row_alone_has_the_bits_it_has_in_company(vocabulary: int):
    n = 24
    logits, uniform = normal(n, vocabulary, 4, 3.0), streams(n)
    logits[:, 7] = logits[:, 3]
    mixed = knobs(
        n, [0.0, 1.0, 0.7], [1.0, 1.0, 0.9, 0.5], [0, 0, 0, 0, 20, 3], [0, 0, 0, 0, 0.1], [0, 3, 0, 0, 20, 0, 0]
    )
    together = draw(logits, mixed, uniform)
    tops = together.tops(mixed.top_logprobs)
    for size in (1, 2, 5, 8, 23):
        for first in range(0, n - size + 1, 4):
            rows = slice(first, first + size)
            alone = draw(logits[rows], some(mixed, rows), uniform[rows])
            assert alone.tokens.tolist() == together.tokens[rows].tolist()
            assert alone.logprobs.tobytes() == together.logprobs[rows].tobytes()
            for one, same in zip(alone.tops(mixed.top_logprobs[rows]), tops[rows], strict=True):
                assert (one is None) == (same is None)
                if one and same:
                    assert (one.ids.tobytes(), one.logprobs.tobytes()) == (same.ids.tobytes(), same.logprobs.tobytes())


def test_rows_that_ask_for_no_top_logprobs_have_none(drawn: Callable[..., Drawn]):
    settings = knobs(4, top_logprobs=[0, 2, 0, 5])
    tops = drawn(normal(4, 50, 5), settings, streams(4)).tops(settings.top_logprobs)
    assert [len(top.ids) if top else None for top in tops] == [None, 2, None, 5]
    assert drawn(normal(4, 50, 5), knobs(4), streams(4)).top is None


def test_equal_tokens_are_reported_by_id_and_stay_in_together(drawn: Callable[..., Drawn]):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    for settings in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        result = drawn(logits, knobs(1, **settings, top_logprobs=6), np.array([0.99]))
        assert result.tokens[0] == 5
        assert result.top is not None
        assert result.top.ids[0, :3].tolist() == [1, 3, 5]
        assert result.top.logprobs[0] == pytest.approx([np.log(1 / 3)] * 3 + [-np.inf] * 3)
    everything = drawn(logits, knobs(1, top_logprobs=6), np.array([0.0])).top
    assert everything is not None
    assert everything.ids[0].tolist() == [1, 3, 5, 2, 4, 0]


@pytest.mark.parametrize("vocabulary", [4, 3000])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_never_give_an_impossible_token(
    drawn: Callable[..., Drawn], vocabulary: int, uniform: float
):
    logits = torch.full((1, vocabulary), float("-inf"))
    logits[0, 1:3] = 0.0
    result = drawn(logits, knobs(1), np.array([uniform]))
    assert result.tokens[0] == (1 if uniform == 0 else 2)
    assert result.logprobs[0] == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e6])
def test_extreme_temperatures_are_greedy_or_uniform(drawn: Callable[..., Drawn], temperature: float):
    logits = normal(200, 40, 6)
    result = drawn(logits, knobs(200, temperature), streams(200))
    if temperature < 1:
        assert result.tokens.tolist() == logits.argmax(-1).tolist()
        assert not result.logprobs.any()
    else:
        assert np.abs(result.logprobs - np.log(1 / 40)).max() < 1e-4
        assert len(set(result.tokens.tolist())) > 35


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_best_token_alone_is_left_by_the_tightest_filters(drawn: Callable[..., Drawn], size: float):
    logits = normal(64, 1000, 7, size)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        result = drawn(logits, knobs(64, **settings), streams(64))
        assert result.tokens.tolist() == logits.argmax(-1).tolist()
        assert not result.logprobs.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1}])
def test_logits_that_are_not_finite_give_a_logprob_that_is_not_a_number(
    drawn: Callable[..., Drawn], settings: dict[str, Any], bad: float
):
    logits = torch.zeros(3, 8)
    logits[1, 3] = bad
    logits[2] = float("-inf")
    logprobs = drawn(logits, knobs(3, **settings), np.full(3, 0.5)).logprobs
    assert np.isfinite(logprobs).tolist() == [True, False, False]
