"""Learning rates and prompt order by hand."""

from pathlib import Path

import pytest
from raylign.trainers.schedule import learning_rate, rows_drawn, update_rows
from raylign.trainers.stages import DataConfig, SftStage


def stage(**options: object) -> SftStage:
    return SftStage(data=DataConfig(path=str(Path("x"))), learning_rate=1.0, **options)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5]),
    ],
)
def test_rates(schedule: str, rates: list[float]) -> None:
    config = stage(schedule=schedule, warmup_steps=2)
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(rates)


def test_warm_up_is_three_percent_by_default() -> None:
    assert learning_rate(stage(), 0, 100) == pytest.approx(1 / 3)
    assert learning_rate(stage(), 3, 100) == pytest.approx(1)


def test_every_row_once_before_any_twice() -> None:
    drawn = [row for step in range(7) for row in rows_drawn(5, 10, 4 * step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_the_order_is_the_seeds_alone() -> None:
    assert rows_drawn(5, 10, 0, 28)[24:] == rows_drawn(5, 10, 24, 4)
    assert rows_drawn(1, 100, 0, 4) != rows_drawn(2, 100, 0, 4)


def test_minibatches_hold_every_sample_once_an_epoch() -> None:
    parts = update_rows(7, 3, 10, 2, 4)
    assert [len(rows) for rows in parts] == [3, 3, 2, 2] * 2
    for epoch in (parts[:4], parts[4:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
        assert all(rows == sorted(rows) for rows in epoch)
    assert parts[:4] != parts[4:]
    assert parts == update_rows(7, 3, 10, 2, 4)
    assert parts[:4] == update_rows(7, 3, 10, 1, 4)
    assert parts != update_rows(7, 4, 10, 2, 4) != update_rows(8, 3, 10, 2, 4)


def test_a_single_minibatch_is_the_step_in_its_order() -> None:
    assert update_rows(7, 3, 5, 1, 1) == [[0, 1, 2, 3, 4]]
    assert update_rows(7, 3, 5, 3, 1) == [[0, 1, 2, 3, 4]] * 3
    assert [len(rows) for rows in update_rows(7, 3, 2, 1, 4)] == [1, 1]


def test_another_peak_has_the_same_course() -> None:
    for step in range(6):
        assert learning_rate(stage(), step, 6, peak=3.0) == pytest.approx(3 * learning_rate(stage(), step, 6))
