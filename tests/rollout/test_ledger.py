"""The ledger counts every group of a step exactly once."""

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed
from raylign.rollout.ledger import GroupState, Ledger
from raylign.rollout.records import Group


def group(index: int) -> Group:
    return Group(step=4, index=index, prompt=np.array([1]), row={}, worker="w")


def test_a_step_from_pending_to_trained() -> None:
    ledger = Ledger(4, 2)
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
    assert ledger.counts() == {"pending": 0, "running": 0, "generated": 0, "scored": 0, "trained": 2}


def test_a_lost_worker_gives_back_only_what_it_had_not_finished() -> None:
    ledger = Ledger(4, 3)
    ledger.dispatch(0, "a")
    ledger.dispatch(1, "a")
    ledger.dispatch(2, "b")
    ledger.generated(group(0))
    assert ledger.lost("a") == [1]
    assert ledger.pending() == [1]
    assert ledger.counts()["running"] == 1
    assert ledger.losses == {0: 0, 1: 1, 2: 0}


def test_a_group_that_fails_is_counted_apart_from_its_neighbours_that_lost_their_worker() -> None:
    ledger = Ledger(4, 2)
    ledger.dispatch(0, "a")
    ledger.dispatch(1, "a")
    ledger.failed(0)
    assert ledger.lost("a") == [1]
    assert ledger.pending() == [0, 1]
    assert (ledger.failures, ledger.losses) == ({0: 1, 1: 0}, {0: 0, 1: 1})


def test_a_group_that_comes_twice_counts_once() -> None:
    ledger = Ledger(4, 1)
    ledger.dispatch(0, "a")
    ledger.lost("a")
    ledger.dispatch(0, "b")
    assert ledger.generated(group(0))
    assert not ledger.generated(group(0))


@pytest.mark.parametrize("act", ["dispatch", "scored", "trained"])
def test_steps_out_of_order_are_refused(act: str) -> None:
    ledger = Ledger(4, 1)
    ledger.dispatch(0, "a")
    with pytest.raises(RunFailed, match="step 4, group 0"):
        {
            "dispatch": lambda: ledger.dispatch(0, "b"),
            "scored": lambda: ledger.scored(group(0)),
            "trained": ledger.trained,
        }[act]()
