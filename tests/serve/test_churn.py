"""Isolation under churn, in short; `python -m benchmarks.churn` is the whole."""

from pathlib import Path

from benchmarks.churn import churn


def test_every_answer_under_churn_is_what_it_is_alone(tmp_path: Path) -> None:
    result = churn(tmp_path, adapters=12, cap=3, clients=8, seconds=4)
    assert (result["wrong"], result["errors"]) == (0, [])
    assert result["answers"] > 50
    assert result["different"] > result["models"] / 2 > 3, "the adapters answer differently"
    assert result["registered, promoted and retired"] > 3
