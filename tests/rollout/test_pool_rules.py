"""The pool's decisions, without workers."""

import numpy as np
from raylign.rollout.ledger import Ledger
from raylign.rollout.pool_rules import (
    MAX_FAILURES,
    MAX_LOSSES,
    Holder,
    Moves,
    Running,
    assign,
    give_up,
    longest_first,
    moves,
    new_weights,
    overdue,
    pause,
    prompt_key,
)
from raylign.rollout.records import Group

from .scripted import weights


def test_groups_go_in_order_to_the_least_loaded_worker_as_far_as_there_is_room() -> None:
    assert assign([4, 5, 6, 7], {"a": 1, "b": 0}, capacity=2) == [(4, "b"), (5, "a"), (6, "b")]
    assert assign([4], {}, capacity=2) == []


def test_a_group_is_kept_from_the_workers_it_is_barred_from() -> None:
    assert assign([4, 5], {"a": 0, "b": 1}, 2, {4: ("a",)}) == [(4, "b"), (5, "a")]
    assert assign([4, 5], {"a": 0}, 2, {4: ("a",)}) == [(5, "a")]


def test_the_longest_expected_go_first_and_a_new_prompt_counts_as_a_usual_one() -> None:
    """Prompt 1 gave 30 tokens the last time, prompt 2 gave 10: a new one is expected to give 20."""
    groups = [Group(step=0, index=i, prompt=np.full(n, p), row={}) for i, (p, n) in enumerate([(2, 3), (3, 1), (1, 3)])]
    assert longest_first(groups, {prompt_key(groups[2]): 30, prompt_key(groups[0]): 10}) == [2, 1, 0]


def test_of_prompts_that_nothing_is_known_of_the_longer_go_first_and_of_equals_the_lower_index() -> None:
    groups = [Group(step=0, index=i, prompt=np.full(n, i), row={}) for i, n in enumerate([2, 5, 2, 9])]
    assert longest_first(groups, {}) == [3, 1, 0, 2]


def test_a_group_is_slow_at_twice_the_usual_time_and_not_below_half_a_second() -> None:
    running = [Running(0, 5.9, True), Running(1, 6.1, True), Running(2, 7.0, True)]
    assert overdue(running, [1.0, 3.0, 9.0]) == [2, 1]
    assert overdue([Running(0, 0.4, True), Running(1, 0.6, True)], [0.01]) == [1]
    assert overdue(running, []) == []


def test_a_group_has_at_most_two_copies_on_workers_that_answer() -> None:
    twice = [Running(0, 60.0, True), Running(0, 50.0, True)]
    assert overdue(twice, [1.0]) == []
    assert overdue([Running(0, 60.0, True), Running(0, 0.1, True)], [1.0]) == []
    assert overdue([Running(0, 60.0, False), Running(0, 50.0, False)], []) == [0]
    assert overdue([Running(0, 60.0, False), Running(0, 50.0, True)], [1.0]) == [0]


def test_joining_workers_are_given_up_before_ready_ones_are_drained() -> None:
    assert moves(3, ["a"], ["b"]) == Moves(start=1, unwanted=(), drain=())
    assert moves(2, ["a"], ["b", "c"]) == Moves(start=0, unwanted=("c",), drain=())
    assert moves(1, ["a", "b"], ["c"]) == Moves(start=0, unwanted=("c",), drain=("b",))
    assert moves(0, ["a"], []) == Moves(start=0, unwanted=(), drain=("a",))


def test_the_pause_between_starts_doubles_up_to_a_minute_whatever_the_count() -> None:
    assert [pause(n) for n in (1, 2, 5, 6, 1024, 10**6)] == [2, 4, 32, 60, 60, 60]


def test_a_group_is_given_up_for_its_own_errors_long_before_it_is_for_lost_workers() -> None:
    ledger = Ledger(4, 2, 0, "")
    for attempt in range(MAX_FAILURES):
        assert give_up(ledger, 0, "") is None
        ledger.dispatch(0, f"w{attempt}")
        ledger.dispatch(1, f"w{attempt}")
        ledger.failed(0, f"w{attempt}")
        ledger.lost(f"w{attempt}")
    assert give_up(ledger, 0, "boom") == "step 4, group 0: failed on 4 workers, lastly: boom"
    for attempt in range(MAX_FAILURES, MAX_LOSSES):
        assert give_up(ledger, 1, "") is None
        ledger.dispatch(1, f"w{attempt}")
        ledger.lost(f"w{attempt}")
    assert give_up(ledger, 1, "gone") == "step 4, group 1: lost its worker 20 times, lastly: gone"


def _holders(**versions: tuple[int, int]) -> list[Holder]:
    """Workers by name: the version each holds, and how many groups it runs."""
    return [Holder(name, weights(v), runs, proving=False, silent=False) for name, (v, runs) in versions.items()]


def _told(needs: list[tuple[int, int]], holders: list[Holder], newest: int) -> dict[str, int]:
    found = new_weights([(weights(v), n) for v, n in needs], holders, 2, weights(newest))
    return {name: given.version for name, given in found.items()}


def test_workers_go_over_to_new_weights_one_by_one_as_they_have_nothing_left_to_do() -> None:
    assert _told([(1, 0), (2, 5)], _holders(a=(1, 2), b=(1, 1), c=(1, 0)), 2) == {"c": 2}
    assert _told([], _holders(a=(1, 1), b=(1, 0), c=(2, 0)), 2) == {"b": 2}


def test_a_group_of_older_weights_gets_a_worker_back_and_one_that_holds_them_stays() -> None:
    assert _told([(1, 1), (2, 4)], _holders(a=(2, 0), b=(2, 2)), 2) == {"a": 1}
    assert _told([(1, 1), (2, 4)], _holders(a=(2, 0), b=(1, 0), c=(1, 0)), 2) == {"c": 2}
    assert _told([(1, 1), (2, 4)], _holders(a=(2, 0), b=(1, 1)), 2) == {}  # b has room for it


def test_who_proves_weights_or_is_silent_is_not_counted_on() -> None:
    proving = Holder("a", weights(1), 0, proving=True, silent=False)
    silent = Holder("b", weights(1), 0, proving=False, silent=True)
    assert _told([(1, 3)], [proving, silent, *_holders(c=(2, 0))], 2) == {"b": 2, "c": 1}
    assert _told([], [Holder("a", None, 0, proving=False, silent=False)], 2) == {"a": 2}
