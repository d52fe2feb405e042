"""The pool's decisions, without workers."""

from raylign.rollout.ledger import Ledger
from raylign.rollout.pool_rules import MAX_FAILURES, MAX_LOSSES, Moves, assign, give_up, moves, pause


def test_groups_go_in_order_to_the_least_loaded_worker_as_far_as_there_is_room() -> None:
    assert assign([4, 5, 6, 7], {"a": 1, "b": 0}, capacity=2) == [(4, "b"), (5, "a"), (6, "b")]
    assert assign([4], {}, capacity=2) == []


def test_joining_workers_are_given_up_before_ready_ones_are_drained() -> None:
    assert moves(3, ["a"], ["b"]) == Moves(start=1, unwanted=(), drain=())
    assert moves(2, ["a"], ["b", "c"]) == Moves(start=0, unwanted=("c",), drain=())
    assert moves(1, ["a", "b"], ["c"]) == Moves(start=0, unwanted=("c",), drain=("b",))
    assert moves(0, ["a"], []) == Moves(start=0, unwanted=(), drain=("a",))


def test_the_pause_between_starts_doubles_up_to_a_minute_whatever_the_count() -> None:
    assert [pause(n) for n in (1, 2, 5, 6, 1024, 10**6)] == [2, 4, 32, 60, 60, 60]


def test_a_group_is_given_up_for_its_own_errors_long_before_it_is_for_lost_workers() -> None:
    ledger = Ledger(4, 2)
    for attempt in range(MAX_FAILURES):
        assert give_up(ledger, 0, "") is None
        ledger.dispatch(0, f"w{attempt}")
        ledger.dispatch(1, f"w{attempt}")
        ledger.failed(0)
        ledger.lost(f"w{attempt}")
    assert give_up(ledger, 0, "boom") == "step 4, group 0: failed on 4 workers, lastly: boom"
    for attempt in range(MAX_FAILURES, MAX_LOSSES):
        assert give_up(ledger, 1, "") is None
        ledger.dispatch(1, f"w{attempt}")
        ledger.lost(f"w{attempt}")
    assert give_up(ledger, 1, "gone") == "step 4, group 1: lost its worker 20 times, lastly: gone"
