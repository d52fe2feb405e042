"""Throughput while one of four workers is killed every few seconds, against what the workers that are left can do.

Both sides generate the same steps for as long. The killed side's rate is per second of worker time that was there: a
worker is lost from its SIGKILL until its replacement has proved its weights. A ratio of 1 means that a death costs
nothing but the worker.
"""

import time
from functools import partial

from .arena import Arena
from .measured import Case, Contest, Measured
from .null_pool import GROUP, NullPool, local_ray, null_pool

_WORKERS = 4
_CAPACITY = 4
"""Groups that a worker has at once."""
_GROUPS = 256
"""Groups a step."""
_SECONDS_A_GROUP = 0.1


def cases() -> list[Case]:
    """One: a SIGKILL every three seconds."""
    return [_case(seconds=15.0, every=3.0)]


def quick_cases() -> list[Case]:
    """One kill."""
    return [_case(seconds=3.0, every=1.0)]


def _case(seconds: float, every: float) -> Case:
    return Case(
        name=f"4-workers-one-killed-every-{every:g}-s",
        peer="no kills, times 1 − lost worker-seconds",
        unit="samples per second with four workers",
        group="faults",
        make=partial(_contest, seconds, every),
    )


def _contest(seconds: float, every: float, arena: Arena) -> Contest:
    arena.entered(local_ray)
    pool: NullPool = arena.entered(null_pool, _WORKERS, capacity=_CAPACITY, seconds=_SECONDS_A_GROUP)
    settings = {"workers": _WORKERS, "groups_a_step": _GROUPS, "group_size": GROUP, "seconds_a_group": _SECONDS_A_GROUP}
    return Contest(
        ours=lambda _: run(pool, seconds, every),
        theirs=lambda _: run(pool, seconds, None),
        warm_up=lambda: run(pool, 1.0, None),
        settings=settings | {"seconds": seconds, "kill_every": every},
    )


def run(pool: NullPool, seconds: float, every: float | None) -> Measured:
    """Whole steps for so long, with a kill every so often; the seconds are those that four workers would have had."""
    _complete(pool)
    began, cpu, groups = time.monotonic(), time.process_time(), 0
    killed: list[tuple[float, str]] = []

    def kill_in_time() -> None:
        now = time.monotonic()
        if every and now - began > every * (len(killed) + 1) and now - began < seconds:
            name = pool.names()[0]
            killed.append((now, name))
            pool.kill(name)

    while time.monotonic() - began < seconds:
        pool.generate(_GROUPS, kill_in_time)
        groups += _GROUPS
    ended = time.monotonic()
    lost = lost_seconds([moment for moment, _ in killed], joined(pool, began), ended)
    return Measured(
        amount=groups * GROUP,
        seconds=ended - began - lost / _WORKERS,
        cpu_seconds=time.process_time() - cpu,
    )


def joined(pool: NullPool, since: float) -> list[float]:
    """When workers joined."""
    return [moment for moment, kind, _ in pool.notes if kind == "worker_joined" and moment >= since]


def lost_seconds(killed: list[float], joined: list[float], ended: float) -> float:
    """Worker-seconds between each death and the replacement's joining, first died first replaced; to the end where
    none has come."""
    back = [*sorted(joined), *[ended] * len(killed)]
    return sum(max(0.0, min(b, ended) - k) for k, b in zip(sorted(killed), back, strict=False))


def _complete(pool: NullPool) -> None:
    """Wait until all workers are there."""
    give_up = time.monotonic() + 120
    while pool.pool.size < _WORKERS:
        if time.monotonic() > give_up:
            raise RuntimeError(f"only {pool.pool.size} of {_WORKERS} workers came back")
        pool.pool.advance()
        time.sleep(0.02)
