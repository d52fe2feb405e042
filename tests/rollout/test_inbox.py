"""One answer is waited for while others are handled."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from raylign.cluster.errors import RunFailed, WorkerLost
from raylign.rollout.inbox import Inbox


def call() -> tuple[SimpleNamespace, "Future[Any]"]:
    future: Future[Any] = Future()
    return SimpleNamespace(future=lambda: future), future


def test_others_are_handled_while_one_is_waited_for() -> None:
    inbox, handled = Inbox(), list[int]()
    (update, learned), others = call(), [call() for _ in range(3)]
    for ref, _ in others:
        inbox.expect(ref, lambda future: handled.append(future.result()))

    def tick() -> None:
        """The update ends when all others have been handled, so it must be they that wake the wait."""
        if len(handled) < 3:
            others[len(handled)][1].set_result(len(handled))
        else:
            learned.set_result("learned")

    assert inbox.get(update, actor="policy-0", what="the update", timeout=60, tick=tick) == "learned"
    assert handled == [0, 1, 2]


def test_what_it_raised_is_raised_and_one_that_takes_too_long_is_lost() -> None:
    inbox = Inbox()
    ref, future = call()
    future.set_exception(RunFailed("the gradient is nan"))
    with pytest.raises(RunFailed, match="the gradient is nan"):
        inbox.get(ref, actor="policy-0", what="the update", timeout=60, tick=lambda: None)
    with pytest.raises(WorkerLost, match="policy-0 did not finish the update within 0 s"):
        inbox.get(call()[0], actor="policy-0", what="the update", timeout=0, tick=lambda: None)
