"""What the runs of two sides say of each other, by hand."""

import pytest

from benchmarks.curves import amdahl, comparison, inside, phases, seconds_to, smoothed


def run(rewards: list[float], step: float, generate: float) -> list[dict[str, float]]:
    """Steps of equal length; the first ends ten seconds after the launch."""
    return [
        {"seconds": 10 + step * i, "reward": reward, "seconds/generate": generate} for i, reward in enumerate(rewards)
    ]


def test_rewards_are_smoothed_over_five_steps() -> None:
    assert smoothed([1, 2, 3, 4, 5, 11]) == [1, 1.5, 2, 2.5, 3, 5]


def test_our_mean_is_inside_above_or_below_theirs() -> None:
    ours = [[0.0, 1.0, 5.0, 0.0], [2.0, 1.0, 5.0, 0.0]]
    theirs = [[0.5, 0.0, 0.0, 1.0], [1.5, 1.0, 4.0, 2.0]]
    assert inside(ours, theirs) == {"inside": 0.5, "above": 0.25, "below": 0.25}


def test_time_to_a_reward_runs_from_the_end_of_the_first_step() -> None:
    steps = run([0.0, 1.0, 2.0], 3.0, 1.0)
    assert seconds_to(steps, [0.0, 0.5, 1.0], 1.0) == 6.0
    assert seconds_to(steps, [0.0, 0.5, 1.0], 1.1) is None


def test_phases_add_up_to_the_step_and_leave_out_the_first() -> None:
    steps = run([0.0, 0.0, 0.0], 3.0, 1.0)
    steps[0]["seconds/generate"] = 99.0
    assert phases([steps]) == {"generate": 1.0, "rest": 2.0}


def test_amdahls_ratios() -> None:
    ratios = amdahl({"generate": 2.0, "update": 1.0, "rest": 1.0}, {"generate": 9.0, "update": 3.0})
    assert ratios == {
        "as_measured": 3.0,
        "without_generate": 6.0,
        "without_update": 4.0,
        "generate_and_update_alone": 4.0,
    }


def test_a_comparison_takes_the_reward_that_every_run_of_theirs_reaches() -> None:
    ours = [run([0.0, 1.0, 1.0], 1.0, 0.5)]
    theirs = [run([0.0, 0.5, 1.0], 2.0, 1.5), run([0.0, 0.2, 0.4], 2.0, 1.5)]
    found = comparison(ours, theirs)
    assert found["seconds_a_step"] == {"ours": 1.0, "theirs": 2.0}
    assert found["start_seconds"] == {"ours": 9.0, "theirs": 8.0}
    assert found["seconds_to_reward"] == {"reward": pytest.approx(0.2), "ours": [1.0], "theirs": [2.0, 4.0]}
    assert found["phases"]["theirs"] == {"generate": 1.5, "rest": 0.5}
    assert comparison(ours, []) == {}
