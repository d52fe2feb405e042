"""How many workers are wanted, of numbers worked by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raylign.rollout.config import RolloutConfig
from raylign.trainers.online.balance import Balance
from raylign.trainers.recipe import load_recipe

from .runs import start


def settle(balance: Balance, workers: int, generating: float, learning: float) -> int:
    """What is wanted after three equal steps."""
    for _ in range(3):
        wanted = balance.step(workers, generating, learning)
    return wanted


@pytest.mark.parametrize(
    ("workers", "generating", "learning", "wanted"),
    [
        (1, 12.0, 3.0, 4),  # 4 times as long: ceil(4 / 1.1)
        (4, 12.0, 3.0, 4),  # in step
        (4, 13.0, 3.0, 4),  # 4.33 are within a tenth of 4
        (4, 6.0, 3.0, 2),  # two would do
        (2, 1.0, 10.0, 1),  # never none
        (1, 100.0, 1.0, 6),  # no more than there may be
        (3, 5.4, 3.0, 2),  # 1.8, and with a tenth more still fewer than two: one is idle
        (3, 6.0, 3.0, 3),  # two would have no slack
    ],
)
def test_as_many_workers_as_generation_takes_updates(
    workers: int, generating: float, learning: float, wanted: int
) -> None:
    assert settle(Balance(1, 6), workers, generating, learning) == wanted


def test_one_slow_step_changes_nothing() -> None:
    balance = Balance(1, 8)
    assert [balance.step(2, seconds, 3.0) for seconds in (6.0, 60.0, 6.0, 6.0)] == [2, 2, 2, 2]


def test_another_number_of_workers_is_measured_anew() -> None:
    balance = Balance(1, 8)
    assert settle(balance, 1, 12.0, 3.0) == 4
    assert [balance.step(2, 12.0, 3.0), balance.step(3, 12.0, 3.0)] == [2, 3]
    assert settle(balance, 4, 12.0, 3.0) == 4


def test_bounds_hold_from_the_start() -> None:
    assert settle(Balance(2, 3), 2, 0.1, 3.0) == 2
    assert settle(Balance(2, 3), 2, 60.0, 3.0) == 3


def test_a_run_lets_workers_go_that_its_update_does_not_need_and_ends_the_same(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    """A completion of the tiny model takes a small part of an update: one worker of three will do."""
    auto = {"stages__0__rollout__workers": "{min: 1, max: 3, start: 3, auto: true}", "stages__0__steps": 8}
    run, summary = start(load_recipe(tiny_grpo("auto", **auto)), tmp_path)
    assert summary["status"] == "succeeded"
    assert summary["workers"]["max"] == 3
    first = run.events("scaled")[0]
    assert first["before"] == 3
    assert first["after"] < 3
    _, alone = start(load_recipe(tiny_grpo("one", stages__0__steps=8)), tmp_path)
    assert summary["weights"] == alone["weights"]


def test_auto_alone_is_one_to_eight() -> None:
    workers = RolloutConfig.model_validate({"workers": "auto"}).workers
    assert (workers.min, workers.start, workers.max, workers.auto) == (1, 1, 8, True)
    assert RolloutConfig.model_validate({"workers": 3}).workers.auto is False
