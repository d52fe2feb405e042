"""Random numbers by counter, and sampling by the inverse CDF."""

import itertools

import numpy as np
import pytest
import torch
from raylign.rollout.native.sampling import Knobs, draw, random_bits, stream_key, uniforms
from raylign.rollout.records import SeedKey


def knobs(
    n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, top_logprobs: int = 0
) -> Knobs:
    return Knobs(*(np.full(n, value) for value in (temperature, top_p, top_k, min_p, top_logprobs)))


def drawn(logits: torch.Tensor, settings: Knobs, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    result = draw(logits, settings, uniform)
    return result.tokens, result.logprobs


def streams(n: int, positions: int = 1, run: int = 0) -> np.ndarray:
    keys = np.array([stream_key(SeedKey(run, 0, i)) for i in range(n)], np.uint64)
    return np.concatenate([uniforms(keys, np.full(n, p, np.uint64)) for p in range(positions)])


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


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    n = 20_000
    tokens, logprobs = drawn(probabilities.log().expand(n, 4), knobs(n), streams(n))
    share = np.bincount(tokens, minlength=4) / n
    assert np.abs(share - probabilities.numpy()).max() < 0.015
    assert np.allclose(np.exp(logprobs), probabilities.numpy()[tokens], atol=1e-6)


def test_temperature_sharpens_and_its_logprobs_are_those_of_the_sharpened_distribution():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = drawn(logits, knobs(64, temperature=0.5), streams(64))
    expected = torch.log_softmax(logits / 0.5, -1)[torch.arange(64), torch.from_numpy(tokens)]
    assert np.allclose(logprobs, expected.numpy(), atol=1e-5)


def test_greedy_takes_the_best_token_and_its_plain_logprob_whatever_the_other_knobs():
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = drawn(logits, knobs(16, temperature=0, top_p=0.3, top_k=2), streams(16))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert np.allclose(logprobs, torch.log_softmax(logits, -1).max(-1).values.numpy(), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 5), (0.6, 0), (0.5, 7), (0.999999, 0)])
def test_top_k_and_top_p_keep_what_transformers_keeps(vocabulary: int, top_p: float, top_k: int):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    n = 32
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    kept = logits / 0.8
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    expected = torch.log_softmax(kept, -1)
    for position in range(5):
        keys = np.array([stream_key(SeedKey(0, 0, i)) for i in range(n)], np.uint64)
        uniform = uniforms(keys, np.full(n, position, np.uint64))
        tokens, logprobs = drawn(logits, knobs(n, 0.8, top_p, top_k), uniform)
        assert np.allclose(logprobs, expected[torch.arange(n), torch.from_numpy(tokens)].numpy(), atol=1e-4)


@pytest.mark.parametrize("vocabulary", [25, 1024, 1025, 30_000])
def test_a_row_alone_has_the_bits_it_has_in_company(vocabulary: int):
    n = 24
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(4)) * 3
    mixed = Knobs(
        np.tile([0.0, 1.0, 0.7], 8),
        np.tile([1.0, 1.0, 0.9, 0.5], 6),
        np.tile([0, 0, 0, 0, 20, 3], 4),
        np.zeros(24),
        np.zeros(24, int),
    )
    uniform = streams(n)
    tokens, logprobs = drawn(logits, mixed, uniform)
    for size in (1, 2, 5, 8, 23):
        for first in range(0, n - size + 1, 4):
            rows = slice(first, first + size)
            part = Knobs(*(getattr(mixed, name)[rows] for name in Knobs.__dataclass_fields__))
            few, few_logprobs = drawn(logits[rows], part, uniform[rows])
            assert few.tolist() == tokens[rows].tolist()
            assert few_logprobs.tobytes() == logprobs[rows].tobytes()


@pytest.mark.parametrize("vocabulary", [4, 3000])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_never_give_an_impossible_token(vocabulary: int, uniform: float):
    logits = torch.full((1, vocabulary), float("-inf"))
    logits[0, 1:3] = 0.0
    tokens, logprobs = drawn(logits, knobs(1), np.array([uniform]))
    assert tokens[0] == (1 if uniform == 0 else 2)
    assert logprobs[0] == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_a_logprob_that_is_not_a_number(bad: float):
    logits = torch.zeros(2, 8)
    logits[1, 3] = bad
    _, logprobs = drawn(logits, knobs(2), np.array([0.5, 0.5]))
    assert np.isfinite(logprobs[0])
    assert np.isnan(logprobs[1])
