"""The ledger counts every group of a step exactly once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed
from raylign.rollout.ledger import GroupState, Ledger
from raylign.rollout.records import Group


def group(index: int) -> Group:
    """As it comes back from weight version 7, which the ledgers below are on."""
    return Group(step=4, index=index, prompt=np.array([1]), row={}, worker="w", version=7, digest="d7")


def test_a_step_from_pending_to_trained() -> None:
    ledger = Ledger(4, 2, 7, "d7")
    assert ledger.pending() == [0, 1]
    for index in (1, 0):
        ledger.dispatch(index, "a")
    assert ledger.pending() == []
    assert ledger.counts()["running"] == 2
    assert ledger.generated(group(1))
    assert not ledger.complete(GroupState.GENERATED)
    assert ledger.generated(group(0))
    assert ledger.complete(GroupState.GENERATED)
    assert [g.index for g in ledger.batch()] == [0, 1]
    for g in ledger.batch():
        ledger.scored(g)
    ledger.trained()
    assert ledger.counts() == {"pending": 0, "running": 0, "generated": 0, "scored": 0, "trained": 2, "carried": 0}


def test_a_group_that_is_carried_is_done_with_in_its_step_and_not_trained() -> None:
    ledger = Ledger(4, 2, 7, "d7")
    for index in (0, 1):
        ledger.dispatch(index, "a")
        assert ledger.generated(group(index))
    ledger.carried(group(0))
    assert [[g.index for g in groups] for groups in (ledger.batch(), ledger.left())] == [[1], [0]]
    assert not ledger.complete(GroupState.SCORED)
    ledger.scored(group(1))
    assert ledger.complete(GroupState.SCORED)
    with pytest.raises(RunFailed, match="step 4, group 0: cannot become scored from carried"):
        ledger.scored(group(0))
    ledger.trained()
    assert {state: n for state, n in ledger.counts().items() if n} == {"trained": 1, "carried": 1}


def test_a_lost_worker_gives_back_only_what_it_had_not_finished() -> None:
    ledger = Ledger(4, 3, 7, "d7")
    ledger.dispatch(0, "a")
    ledger.dispatch(1, "a")
    ledger.dispatch(2, "b")
    ledger.generated(group(0))
    assert ledger.lost("a") == [1]
    assert ledger.pending() == [1]
    assert ledger.counts()["running"] == 1
    assert ledger.losses == {0: 0, 1: 1, 2: 0}


def test_a_group_that_fails_is_counted_apart_from_its_neighbours_that_lost_their_worker() -> None:
    ledger = Ledger(4, 2, 7, "d7")
    ledger.dispatch(0, "a")
    ledger.dispatch(1, "a")
    ledger.failed(0, "a")
    assert ledger.lost("a") == [1]
    assert ledger.pending() == [0, 1]
    assert (ledger.failures, ledger.losses) == ({0: 1, 1: 0}, {0: 0, 1: 1})


def test_a_group_that_comes_twice_counts_once() -> None:
    ledger = Ledger(4, 1, 7, "d7")
    ledger.dispatch(0, "a")
    ledger.lost("a")
    ledger.dispatch(0, "b")
    assert ledger.generated(group(0))
    assert not ledger.generated(group(0))


def test_a_copy_that_is_lost_or_fails_leaves_the_other_running() -> None:
    ledger = Ledger(4, 3, 7, "d7")
    for index in range(3):
        ledger.dispatch(index, "slow")
    ledger.duplicate(0, "b")
    ledger.duplicate(1, "c")
    assert ledger.runners(0) == ("slow", "b")
    ledger.failed(0, "b")
    assert ledger.runners(0) == ("slow",)
    assert ledger.lost("slow") == [0, 2]
    assert ledger.pending() == [0, 2]
    assert ledger.runners(1) == ("c",)
    assert ledger.generated(group(1))
    assert ledger.runners(1) == ()
    assert ledger.lost("c") == []
    assert (ledger.failures, ledger.losses) == ({0: 1, 1: 0, 2: 0}, {0: 1, 1: 1, 2: 1})


def test_only_a_running_group_has_copies_and_only_on_different_workers() -> None:
    ledger = Ledger(4, 2, 7, "d7")
    with pytest.raises(RunFailed, match="step 4, group 0 is pending and cannot be given to b as well"):
        ledger.duplicate(0, "b")
    ledger.dispatch(0, "a")
    with pytest.raises(RunFailed, match="group 0 is running and cannot be given to a as well"):
        ledger.duplicate(0, "a")


@pytest.mark.parametrize("changes", [{"version": 6, "digest": "d6"}, {"version": 8}, {"digest": "other"}])
def test_a_group_from_other_weights_than_the_steps_is_refused_and_not_counted(changes: dict[str, Any]) -> None:
    ledger = Ledger(4, 1, 7, "d7")
    ledger.dispatch(0, "a")
    with pytest.raises(
        RunFailed, match=r"step 4, group 0 came back from weight version \d \(.*the step is on 7 \(d7\)"
    ):
        ledger.generated(replace(group(0), **changes))
    assert ledger.counts()["running"] == 1
    ledger.failed(0, "a")
    assert ledger.pending() == [0]
    assert ledger.batch() == []


@pytest.mark.parametrize("act", ["dispatch", "scored", "trained"])
def test_steps_out_of_order_are_refused(act: str) -> None:
    ledger = Ledger(4, 1, 7, "d7")
    ledger.dispatch(0, "a")
    with pytest.raises(RunFailed, match="step 4, group 0"):
        {
            "dispatch": lambda: ledger.dispatch(0, "b"),
            "scored": lambda: ledger.scored(group(0)),
            "trained": ledger.trained,
        }[act]()
