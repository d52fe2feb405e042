"""Samples that share a row: the layout by hand, the cheapest cut, and the same log-probs and gradients as apart."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.prefixes import Bundle, Packing, Row
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.scoring_model import align, completion_logprobs, logprobs_of, packing_for
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, PreTrainedConfig, PreTrainedModel

from tests.rollout.models import ARCHITECTURES, save_model


def sample(prompt: Sequence[int], tokens: Sequence[int]) -> TrainSample:
    none = np.zeros(len(tokens), np.float32)
    return TrainSample(
        prompt=np.array(prompt, np.int32), tokens=np.array(tokens, np.int32), behaviour=none, advantages=none
    )


def groups(prompts: int, size: int, lengths: tuple[int, int]) -> list[TrainSample]:
    """Groups with a prompt each, which all begin alike; completions may be the same or begin alike."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(prompts):
        prompt = [5, 6, *random.integers(3, 90, 4)]
        made += [sample(prompt, random.integers(3, 6, random.integers(*lengths))) for _ in range(size)]
    return made


def test_a_row_by_hand() -> None:
    """Prompt 7 8; completions 3 4 9, 3 5 9 and 3: 7 8 3 are there once, and the last tokens not at all."""
    row = Row.of([sample([7, 8], [3, 4, 9]), sample([7, 8], [3, 5, 9]), sample([7, 8], [3])])
    assert row.ids_L.tolist() == [7, 8, 3, 4, 5]
    assert row.depths_L.tolist() == [0, 1, 2, 3, 3]
    assert [path.tolist() for path in row.paths] == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1]]
    assert [places.tolist() for places in row.predictors()] == [[1, 2, 3], [1, 2, 4], [1]]
    assert row.sees(6).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_cut_by_hand() -> None:
    """A shared row saves 4 of 15 tokens and looks at 11² pairs instead of 7²/2 + 8²/2."""
    one, two = sample([1, 2, 3, 4], [5, 6, 7, 8]), sample([1, 2, 3, 4], [6, 5, 4, 3, 2])
    assert Packing(20).bundles([one, two])[0].places == (0,)
    together, *rest = Packing(20, pair_cost=4 / (121 - 56.5) - 0.001).bundles([two, one])
    assert (together.places, together.tokens, rest) == ((1, 0), 11, [])
    assert len(Packing(20, pair_cost=4 / (121 - 56.5) + 0.001).bundles([one, two])) == 2
    assert len(Packing(10, pair_cost=0.0).bundles([one, two])) == 2
    assert len(Packing(20, pair_cost=0.0, window=8).bundles([one, two])) == 2
    assert Packing(20, pair_cost=0.0).bundles([]) == []


@pytest.mark.parametrize("cost", [0.0, 0.004, 0.02])
def test_the_cut_costs_least_of_all_and_depends_on_no_order(cost: float) -> None:
    samples, packing = groups(3, 3, (2, 9)), Packing(30, pair_cost=cost)
    ordered = sorted(samples, key=lambda s: [*s.prompt, *s.tokens[:-1]])
    bundles = packing.bundles(samples)

    def price(rows: list[Row]) -> float:
        return sum(r.length + r.length**2 * cost / (1 if r.shared else 2) for r in rows)

    cuts = [[0, *cut, 9] for n in range(9) for cut in combinations(range(1, 9), n)]
    every = [[Row.of(ordered[a:b]) for a, b in pairwise(cut)] for cut in cuts]
    allowed = [rows for rows in every if all(row.length <= 30 for row in rows)]
    assert price([row for b in bundles for row in b.rows]) == pytest.approx(min(map(price, allowed)))
    assert sorted(i for b in bundles for i in b.places) == list(range(9))

    def rows(bundles: list[Bundle]) -> list[list[int]]:
        return sorted(row.ids_L.tolist() for b in bundles for row in b.rows)

    assert rows(packing.bundles(samples[::-1])) == rows(bundles)


def test_a_pair_stays_together() -> None:
    one = replace(sample([1, 2], [3, 4]), rejected=sample([1, 2], [4, 4]))
    apart, together = Packing(100).bundles([one])[0], Packing(100, pair_cost=0.0).bundles([one])[0]
    assert [row.ids_L.tolist() for row in apart.rows] == [[1, 2, 3], [1, 2, 4]]
    assert [row.ids_L.tolist() for row in together.rows] == [[1, 2, 3, 4]]
    assert (apart.tokens, together.tokens) == (6, 4)
    assert [row.length for row in Packing(3, pair_cost=0.0).bundles([one])[0].rows] == [3, 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_samples_apart(architecture: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, architecture)).eval()
    samples, packing = groups(3, 4, (1, 9)), packing_for(model, 10_000)
    sliding = architecture.endswith("sliding")
    assert packing.window == (6 if sliding else None)
    bundles = packing.bundles(samples)
    assert any(b.rows[0].shared for b in bundles) is not sliding
    apart = logprobs_of(model, samples, 0.7, Packing(10_000), Ranks("cpu"))
    for got, wanted in zip(logprobs_of(model, samples, 0.7, packing, Ranks("cpu")), apart, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)

    def gradient(packing: Packing) -> torch.Tensor:
        """Of the sum of all log-probs and entropies, each times a number of its own."""
        model.zero_grad()
        bundles = packing.bundles(samples)
        logprobs_BT, entropy_BT = completion_logprobs(model, align(bundles, "cpu"), 1.0, entropy_gradient=True)
        order = torch.tensor([i for b in bundles for i in b.places])
        factors_BT = torch.rand(12, 9, generator=torch.Generator().manual_seed(0))[order, : logprobs_BT.shape[1]]
        (factors_BT * (logprobs_BT + entropy_BT)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted = gradient(Packing(10_000))
    assert (gradient(packing) - wanted).norm() < 1e-5 * wanted.norm()


def test_a_sample_longer_than_the_window_keeps_it_beside_those_that_share_a_row(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "mistral-sliding", sliding_window=16)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = [*groups(1, 8, (3, 9)), sample(range(3, 43), range(3, 13))]
    packing = packing_for(model, 10_000)
    assert sorted(len(b.places) for b in packing.bundles(samples)) == [1, 8]
    apart = logprobs_of(model, samples, 1.0, Packing(10_000), Ranks("cpu"))
    for got, wanted in zip(logprobs_of(model, samples, 1.0, packing, Ranks("cpu")), apart, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),  # positions by the distance of places
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),  # no attention
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_cannot_share_is_found_out(config: PreTrainedConfig) -> None:
    model = random_model(config)
    assert packing_for(model, 100) == Packing(100)


def test_half_precision_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama"), dtype=torch.bfloat16).eval()
    assert packing_for(model, 100).pair_cost == 0.2 / 32
