"""Goodput from a run's records, by hand."""

import pytest

from benchmarks.recovery import goodput, step_seconds


def test_goodput_and_the_formula_of_a_run_with_one_death() -> None:
    # Steps of 1 s, a checkpoint of 0.5 s after ten. It dies at 14 s, is back at step 10 at 18 s, and ends at 28 s.
    ended = [*range(10), *range(19, 29)]
    metrics = [{"step": step, "time": float(time)} for step, time in enumerate(ended)]
    checkpoints = [{"step": 10, "time": 9.5}, {"step": 20, "time": 28.5}]
    found = goodput(metrics, checkpoints, [{"time": 18.0}], [14.0])
    assert (found.kills, found.wall, found.useful, found.delta, found.tau) == (1, 28, 19, 0.5, 10.5)
    assert (found.recovery, found.between) == (4, 28)
    assert found.formula == pytest.approx(1 - 0.5 / 10.5 - (5.25 + 4) / 28)


def test_a_step_takes_the_sum_of_its_phases() -> None:
    steps = [{"seconds/generate": 1.0, "seconds/update": x, "reward/mean": 9.0} for x in (1.0, 2.0, 30.0)]
    assert step_seconds(steps) == 3.0
