"""Waiting for actors on a real Ray: time-outs, ticks, and whose error it is."""

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
