"""One answer is waited for while others are handled."""

import os
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from raylign.cluster.errors import RunFailed, WorkerFailed, WorkerLost
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

    assert inbox.get_together({"policy-0": update}, what="the update", timeout=60, tick=tick) == ["learned"]
    assert handled == [0, 1, 2]


def test_what_it_raised_is_raised_and_one_that_takes_too_long_is_lost() -> None:
    inbox = Inbox()
    ref, future = call()
    future.set_exception(RunFailed("the gradient is nan"))
    with pytest.raises(RunFailed, match="the gradient is nan"):
        inbox.get_together({"policy-0": ref}, what="the update", timeout=60, tick=lambda: None)
    with pytest.raises(WorkerLost, match="policy-0 did not finish the update within 0 s"):
        inbox.get_together({"policy-0": call()[0]}, what="the update", timeout=0, tick=lambda: None)


def test_of_actors_that_work_together_the_first_that_fails_ends_the_wait_and_a_death_is_told_first(
    ray_session: str,
) -> None:
    import ray

    inbox = Inbox()

    @ray.remote(num_cpus=0.1)
    class Rank:
        def answer(self, number: int) -> int:
            return number

        def fail(self) -> None:
            raise RuntimeError("a peer is gone")

        def wait(self) -> None:
            time.sleep(600)

        def die(self) -> None:
            os._exit(1)

    def together(one: str, other: str, timeout: float = 60) -> None:
        ranks = {f"policy-{i}": Rank.remote() for i in range(2)}
        refs = {n: getattr(a, m).remote() for (n, a), m in zip(ranks.items(), (one, other), strict=True)}
        try:
            inbox.get_together(refs, what="an update", timeout=timeout, tick=lambda: None)
        finally:
            for rank in ranks.values():  # one that sleeps would keep its share of a CPU
                ray.kill(rank)

    ranks = [Rank.remote(), Rank.remote()]
    refs = {f"policy-{i}": rank.answer.remote(i) for i, rank in enumerate(ranks)}
    assert inbox.get_together(refs, what="an update", timeout=60, tick=lambda: None) == [0, 1]
    with pytest.raises(WorkerFailed, match="policy-1 failed in an update: RuntimeError: a peer is gone"):
        together("wait", "fail")
    with pytest.raises(WorkerLost, match="policy-1 was lost during an update"):
        together("fail", "die")
    with pytest.raises(WorkerLost, match="policy-0, policy-1 did not finish an update within 0 s"):
        together("wait", "wait", timeout=0.1)
