"""Alarms, each on metrics made by hand: it speaks when it should, says what it saw, and not a step before."""

from collections.abc import Sequence

import pytest
from raylign.trainers.online.alarms import RULES, alarms
from raylign.trainers.online.early_stop import is_over
from raylign.trainers.stages import AlarmsConfig, EarlyStop

WINDOW = AlarmsConfig(window=2)


def steps(**columns: Sequence[float]) -> list[dict[str, float]]:
    """Metrics of so many steps, from columns; a name has `_` for `/`."""
    names = {name: name.replace("_", "/", 1) if "/" not in name else name for name in columns}
    return [
        {names[name]: float(v) for name, v in zip(columns, line, strict=True)}
        for line in zip(*columns.values(), strict=True)
    ]


def first(history: list[dict[str, float]], config: AlarmsConfig = WINDOW) -> dict[str, int]:
    """Which alarms a run would have, and after how many steps for the first time."""
    found: dict[str, int] = {}
    for end in range(1, len(history) + 1):
        for alarm in alarms(history[:end], config):
            found.setdefault(alarm.name, end)
    return found


def test_entropy_collapses_when_its_mean_falls_below_a_tenth() -> None:
    history = [{"entropy": e} for e in (1.0, 1.0, 0.5, 0.2, 0.08, 0.08)]
    assert first(history) == {"entropy_collapse": 6}
    assert "0.08 nats a token and began at 1:" in alarms(history, WINDOW)[0].saw
    assert first([{"entropy": e} for e in (1.0, 1.0, 0.5, 0.2, 0.1, 0.1)]) == {}


def test_the_kl_blows_up_when_it_grows_tenfold_above_a_tenth_of_a_nat() -> None:
    assert first([{"kl": k} for k in (0.01, 0.01, 0.1, 0.3)]) == {"kl_blow_up": 4}
    assert first([{"kl": k} for k in (0.0001, 0.0001, 0.01, 0.01, 0.09, 0.09)]) == {}
    assert first([{"kl": k} for k in (0.2, 0.2, 0.4, 0.4)]) == {}


def test_repetition_must_be_much_and_more_than_in_the_beginning() -> None:
    assert first([{"repetition": x} for x in (0.1, 0.1, 0.4, 0.7)]) == {"repetition": 4}
    assert first([{"repetition": x} for x in (0.4, 0.4, 0.7, 0.7)]) == {}


def test_a_reward_that_rises_while_held_out_prompts_fall_is_overfitting() -> None:
    """The reward's deviation is 1, so 0.1 counts as moved; measured after every second step."""
    rewards = [0.0, 0.2, 0.2, 0.4, 0.6, 0.8, 0.8, 1.0]
    held = {1: 0.1, 3: 0.5, 5: 0.3, 7: 0.2}
    history = [
        {"reward/mean": r, "reward/std": 1.0, **({"held_out/reward": held[i]} if i in held else {})}
        for i, r in enumerate(rewards)
    ]
    assert first(history) == {"overfitting": 8}
    assert "rose by 0.6 since step 3, and fell by 0.3" in alarms(history, WINDOW)[0].saw
    history[7]["held_out/reward"] = 0.45
    assert first(history) == {}


def test_no_gradient_no_variance_and_cut_completions() -> None:
    assert first([{"grad_norm": g} for g in (1.0, 0.0, 0.0)]) == {"nothing_learned": 3}
    groups = [{"groups/no_variance": n, "groups/drawn": 20.0} for n in (18.0, 19.0, 19.0)]
    assert first(groups) == {"no_variance": 3}
    assert first([{"truncated": t} for t in (0.95, 0.95)]) == {"truncation": 2}
    assert first([{"truncated": t} for t in (0.1, 0.1, 0.6, 0.6)]) == {"truncation": 4}
    assert first([{"truncated": t} for t in (0.4, 0.4, 0.6, 0.6)]) == {}


def test_an_alarm_can_be_ignored_and_lacks_of_metrics_are_no_alarm() -> None:
    history = [{"grad_norm": 0.0}] * 4
    assert first(history, AlarmsConfig(window=2, ignore=["nothing_learned"])) == {}
    assert first([{}] * 10) == {}
    assert {alarm.name for rule in RULES.values() if (alarm := rule(history, 2))} == {"nothing_learned"}


@pytest.mark.parametrize(
    ("measured", "over"),
    [([0.1], False), ([0.5, 0.4, 0.5], True), ([0.5, 0.4, 0.6], False), ([0.1, 0.5, 0.4, 0.52], True)],
)
def test_a_stage_is_over_when_the_last_measurements_are_no_better(measured: list[float], over: bool) -> None:
    assert is_over(measured, EarlyStop(patience=2, least=0.05)) is over
    assert is_over([-m for m in measured], EarlyStop(patience=2, least=0.05, mode="min")) is over
