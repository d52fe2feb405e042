"""Learning rates and prompt order by hand."""

from pathlib import Path

import pytest
from raylign.trainers.schedule import learning_rate, rows_drawn
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
