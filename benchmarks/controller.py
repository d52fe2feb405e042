"""What the pool costs the controller: its CPU seconds per sample, with workers that answer at once.

Against Ray's `ActorPool` on the same actors. It gives an actor one group at a time, and so does the pool in the cases
named `one-each`; in the others a worker has as many at once as the recipe's defaults give it. And against itself with
one worker: flat in the number of workers is a ratio of 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from raylign.rollout.config import RolloutConfig

from .arena import Arena
from .measured import Case, Contest, Measured, measure
from .null_pool import GROUP, NullPool, local_ray, null_pool, tasks

Work = Callable[[], None]

_GROUPS = 512
"""Groups a repetition."""


def cases() -> list[Case]:
    """Named like `16-workers-vs-ActorPool`."""
    return _cases((1, 4, 16, 64), _GROUPS, at_once=RolloutConfig().slots // RolloutConfig().group_size)


def quick_cases() -> list[Case]:
    """One and two workers."""
    return _cases((1, 2), 32, at_once=2)


def _cases(counts: tuple[int, ...], groups: int, at_once: int) -> list[Case]:
    by_size = [
        case
        for n in counts
        for case in (
            _case(f"{n}-workers-vs-ActorPool", "ActorPool", partial(_against_actor_pool, n, groups, at_once)),
            _case(f"{n}-workers-one-each-vs-ActorPool", "ActorPool", partial(_against_actor_pool, n, groups, 1)),
        )
    ]
    flat = [
        _case(f"{n}-workers-vs-1-worker", "1 worker", partial(_against_one, n, groups, at_once)) for n in counts[1:]
    ]
    return by_size + flat


def _case(name: str, peer: str, make: Any) -> Case:
    return Case(name=name, peer=peer, unit="samples per CPU second of the controller", group="controller", make=make)


def _pool(arena: Arena, workers: int, at_once: int) -> NullPool:
    arena.entered(local_ray)
    made: NullPool = arena.entered(null_pool, workers)
    made.give(at_once)
    return made


def _against_actor_pool(workers: int, groups: int, at_once: int, arena: Arena) -> Contest:
    ours = _pool(arena, workers, at_once)
    return _contest(
        partial(ours.generate, groups), partial(_through_actor_pool, ours, groups), workers, groups, at_once
    )


def _against_one(workers: int, groups: int, at_once: int, arena: Arena) -> Contest:
    ours, one = _pool(arena, workers, at_once), _pool(arena, 1, at_once)
    return _contest(partial(ours.generate, groups), partial(one.generate, groups), workers, groups, at_once)


def _contest(ours: Work, theirs: Work, workers: int, groups: int, at_once: int) -> Contest:
    def warm_up() -> None:
        ours()
        theirs()

    return Contest(
        ours=lambda _: _cpu(groups, ours),
        theirs=lambda _: _cpu(groups, theirs),
        warm_up=warm_up,
        settings={"workers": workers, "groups": groups, "group_size": GROUP, "groups_at_once_per_worker": at_once},
    )


def _cpu(groups: int, work: Work) -> Measured:
    """A repetition whose seconds are those of this process's CPU."""
    done = measure(groups * GROUP, work)
    return Measured(amount=done.amount, seconds=done.cpu_seconds, cpu_seconds=done.cpu_seconds)


def _through_actor_pool(pool: NullPool, groups: int) -> None:
    """The same groups on the same actors."""
    import ray
    from ray.util import ActorPool

    actors = ActorPool([ray.get_actor(name) for name in pool.names()])
    made = actors.map_unordered(lambda actor, group: actor.generate.remote(group, 0), tasks(groups, pool.step))
    if sum(len(group.samples) for group in made) != groups * GROUP:
        raise RuntimeError("ActorPool lost samples")
