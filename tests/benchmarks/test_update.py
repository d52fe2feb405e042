"""The policy update's benchmark: both sides compute the same gradient, from the same weights, of the same samples."""

from pathlib import Path

import pytest

from benchmarks import limits, update
from benchmarks.memory import peak_megabytes
from benchmarks.models import Shape, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("1M", "fp32", tmp_path_factory.mktemp("update") / "model")


@pytest.mark.parametrize(("kind", "peer"), [("lora", "trl"), ("full", "trl-defaults")])
def test_gradients_are_those_of_trl(kind: update.Kind, peer: str, folder: Path) -> None:
    work = update.workload("1M", 6, 16, 5)
    samples = update.samples_of(work, 1)
    ours, theirs = update.policy(folder, kind), update.trl(folder, kind, 16, peer)
    assert update.gradient_gap(ours, theirs, samples) < 1e-5


def test_samples_are_groups_of_eight_with_new_tokens_in_every_pair() -> None:
    work = update.workload("1M", 6, 16, 5)
    first, again, other = (update.samples_of(work, pair) for pair in (1, 1, 2))
    assert (
        [s.tokens.tolist() for s in first] == [s.tokens.tolist() for s in again] != [s.tokens.tolist() for s in other]
    )
    assert len({s.prompt.tobytes() for s in first}) == 2
    assert len({s.prompt.tobytes() for s in first[:8]}) == 1
    assert update.real_tokens(first) == 16 * 6 + sum(work.lengths)


def test_the_limit_counts_a_groups_prompt_once_and_the_head_at_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each row of any product: two layers of seven products, and the head."""
    for module in (limits, update):
        monkeypatch.setattr(module, "product_seconds", lambda rows, matrix, dtype: float(rows))
    shape = Shape(vocabulary=10, hidden=4, intermediate=6, layers=2, heads=2)
    work = update.workload("1M", 6, 16, 5)
    body, head = 14 * (2 * 6 + work.useful), work.useful
    real = 16 * 6 + work.useful
    assert update.tokens_per_second(shape, "full", work) == pytest.approx(real / (3 * (body + head)))
    assert update.tokens_per_second(shape, "lora", work) == pytest.approx(real / (2 * (body + head)))


def test_the_peak_of_memory_is_that_of_the_work_alone() -> None:
    assert 90 < peak_megabytes(_hold, 100) < 150


def _hold(megabytes: int) -> object:
    return lambda: len(bytearray(b"x") * (megabytes * 10**6))


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in update.cases()]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * 3
    assert "25M-lora-p32-vs-trl-defaults" in names
