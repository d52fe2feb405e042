"""Waiting for actors on a real Ray: time-outs, ticks, and whose error it is."""

import os
import time

import pytest
from raylign.cluster import calls
from raylign.cluster.errors import WorkerFailed, WorkerLost


class StopNow(Exception):
    """What a tick may raise."""


def test_a_wait_ticks_and_what_a_tick_raises_ends_it(ray_session: str) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def slow() -> None:
        time.sleep(60)

    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            raise StopNow

    ref = slow.remote()
    with pytest.raises(StopNow):
        calls.get(ref, actor="reward-0", what="a score", timeout=60, tick=tick)
    assert ticks[2] - ticks[0] < 10
    with pytest.raises(WorkerLost, match="reward-0 did not finish a score within 1 s"):
        calls.get(ref, actor="reward-0", what="a score", timeout=1, tick=lambda: None)
    ray.cancel(ref, force=True)


def test_an_answer_comes_with_and_without_ticks(ray_session: str) -> None:
    import ray

    ref = ray.put(5)
    assert calls.get(ref, actor="a", what="b", timeout=10) == 5
    assert calls.get([ref, ref], actor="a", what="b", timeout=10, tick=lambda: None) == [5, 5]


def test_a_time_out_inside_a_task_is_the_tasks_own_error(ray_session: str) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def late() -> None:
        raise TimeoutError("the judge is silent")

    with pytest.raises(WorkerFailed, match="reward-0 failed in a score: TimeoutError: the judge is silent"):
        calls.get(late.remote(), actor="reward-0", what="a score", timeout=60, tick=lambda: None)


def test_of_actors_that_work_together_the_first_that_fails_ends_the_wait_and_a_death_is_told_first(
    ray_session: str,
) -> None:
    import ray

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
        calls.get_together(refs, what="an update", timeout=timeout)

    ranks = [Rank.remote(), Rank.remote()]
    refs = {f"policy-{i}": rank.answer.remote(i) for i, rank in enumerate(ranks)}
    assert calls.get_together(refs, what="an update", timeout=60) == [0, 1]
    with pytest.raises(WorkerFailed, match="policy-1 failed in an update: RuntimeError: a peer is gone"):
        together("wait", "fail")
    with pytest.raises(WorkerLost, match="policy-1 was lost during an update"):
        together("fail", "die")
    with pytest.raises(WorkerLost, match="policy-0, policy-1 did not finish an update within 0 s"):
        together("wait", "wait", timeout=0.1)
