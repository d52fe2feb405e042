"""The named actors of an online stage: their places, the calls on them, and who of them is lost."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import Resources
from ...cluster.errors import DoesNotFit, WorkerFailed, WorkerLost
from ...cluster.placement import free_offers, node_of, place, release, wished
from ...cluster.planning import Offer, amount
from ...rollout.inbox import Inbox
from ...rollout.places import Places

END_SECONDS = 60.0
"""How long an actor that was ended may go on holding its name."""

KEEP_SECONDS = 2.0
"""How long those who stand hold up the choice of nodes for others; Ray tells of freed resources up to a second late."""

PULSE_SECONDS = 1.0
"""How long an actor has to answer for its life before others are placed; one that is busy may take longer."""

Tick = Callable[[], None]
"""Called at least twice a second during a wait; what it raises ends the wait."""


class Actors:
    """Starts actors under names that `ray list actors` shows, and waits for what they do.

    Waiting raises `WorkerLost`, which names the actor and what it was doing, after `timeout` seconds. `on_end` is told
    of each that is ended, by whatever.
    """

    def __init__(
        self,
        prefix: str,
        places: Places,
        inbox: Inbox,
        *,
        wait_seconds: float,
        timeout: float,
        on_end: Callable[[str], None],
    ) -> None:
        self._prefix, self._places, self._inbox = prefix, places, inbox
        self._wait_seconds, self._timeout, self._on_end = wait_seconds, timeout, on_end
        self._there: dict[str, Any] = {}
        self._placements: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self.waits: list[Wait] = []
        """What is waited for from an actor now."""
        self.lost: set[str] = set()
        """Who died, hung or failed; they are to be ended and begun anew."""

    @property
    def names(self) -> list[str]:
        """Those that are there, in the order of their start."""
        return list(self._there)

    def __contains__(self, name: str) -> bool:
        return name in self._there

    def __getitem__(self, name: str) -> Any:
        return self._there[name]

    def of(self, role: str) -> list[str]:
        """The ranks or copies of a role that are there."""
        return [name for name in self._there if name.rpartition("-")[0] == role]

    def node(self, name: str) -> str:
        """Where an actor stands; empty while that is not known."""
        return self._nodes.get(name, "")

    @contextmanager
    def waiting_for(self, what: str, *names: str) -> Iterator[None]:
        """Say what is waited for while the block lasts, and note who is lost in it."""
        waits = [Wait(what, f"{self._prefix}{name}", self.node(name), time.time()) for name in names]
        self.waits += waits
        try:
            yield
        except (WorkerLost, WorkerFailed):
            self.lost = self.lost or set(names)  # the first: a wait may end because `tick` found another one dead
            raise
        finally:
            self.waits = [wait for wait in self.waits if wait not in waits]

    def begin(
        self, name: str, role: type, resources: Resources, given: tuple[Any, ...], tick: Tick, **options: int
    ) -> bool:
        """Start an actor unless it is there; whether it was not."""
        if name in self._there:
            return False

        def cancelled() -> bool:
            tick()  # what it raises gives the place back
            self._settle_again()
            return False

        calls.wait_until_gone(f"{self._prefix}{name}", timeout=END_SECONDS, tick=tick)
        with self.waiting_for(f"a place with {amount(resources.cpus, resources.gpus)}", name):
            placement = place(
                f"{self._prefix}{name}",
                resources,
                self._wait_seconds,
                bounds=partial(self._places.bounds, name),
                cancelled=cancelled,
            )
        self._placements[name] = placement
        self._nodes[name] = node_of(placement) or ""
        self._there[name] = self.made(name, role, resources, given, placement, **options)
        return True

    def made(
        self, name: str, role: type, resources: Resources, given: tuple[Any, ...], placement: Any, **options: int
    ) -> Any:
        """An actor, which begins as soon as it has its place."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(role).options(
            name=f"{self._prefix}{name}",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
            **options,
        )
        return actor.remote(*given)

    def keep(self, name: str, actor: Any, placement: Any) -> None:
        """Count one that was made elsewhere and is up."""
        self._there[name], self._placements[name] = actor, placement
        self._nodes[name] = node_of(placement) or ""

    def settle(self, movable: Callable[[], list[str]], tick: Tick) -> None:
        """Where roles have wishes, choose the nodes of all actors that are missing. Raises `DoesNotFit`.

        Who is `movable` is started anew where he is dead. All keep their places for a while; where that leaves no room,
        who is movable gives his up, and rollout workers follow.
        """
        began = time.monotonic()
        with self.waiting_for("nodes as the roles wish", "policy-0"), wished(self._places.asked()) as wish:
            while self._places.wished:
                nodes, waited = free_offers(), time.monotonic() - began
                moving = waited > KEEP_SECONDS
                self.end(name for name in movable() if moving or not self._lives(name, nodes))
                try:
                    return self._places.choose(self._there, nodes, moving=moving)
                except DoesNotFit as error:
                    if waited > self._wait_seconds:
                        raise DoesNotFit(f"{error}. That is what was free for {self._wait_seconds:g} s") from None
                wish()  # nobody asks Ray for a place before all have a node
                tick()
                time.sleep(0.2)

    def _settle_again(self) -> None:
        """Choose other nodes where one that was chosen is lost before all have their places, as soon as there are."""
        if not self._places.wished or self._places.settled(self._there, nodes := free_offers()):
            return
        for moving in (False, True):
            with suppress(DoesNotFit):
                return self._places.choose(self._there, nodes, moving=moving)

    def _lives(self, name: str, nodes: Sequence[Offer]) -> bool:
        """Whether an actor's node is among these and it is not known to be dead; Ray takes a while to miss a node."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(ray.wait([self._there[name].__ray_ready__.remote()], timeout=PULSE_SECONDS)[0])
        except RayError:
            return False
        return self._places.on(nodes, name)

    def ask(self, names: Sequence[str], what: str, tick: Tick, method: str, *given: Any) -> list[Any]:
        """What each answers to a call; `what` says in words what they are at."""
        return self.answers(names, what, tick, self.call(names, method, *given))

    def call(self, names: Sequence[str], method: str, *given: Any) -> list[Any]:
        """Call a method on each, without waiting."""
        return [getattr(self._there[name], method).remote(*given) for name in names]

    def answers(
        self, names: Sequence[str], what: str, tick: Tick, refs: Sequence[Any], *, timeout: float | None = None
    ) -> list[Any]:
        """Wait for calls on actors that work together; the first that fails ends the wait."""
        with self.waiting_for(what, *names):
            return self._inbox.get_together(
                dict(zip(names, refs, strict=True)), what=what, timeout=timeout or self._timeout, tick=tick
            )

    def end(self, names: Iterable[str]) -> None:
        """End these actors, whatever they are at, and give their places back; then nobody counts as lost."""
        for name in names:
            self.end_one(name)
        self.lost = set()

    def end_one(self, name: str) -> None:
        """End an actor, whatever it is at, and give its place back."""
        calls.end([actor] if (actor := self._there.pop(name, None)) else [])
        if placement := self._placements.pop(name, None):
            release(placement)
        self._nodes.pop(name, None)
        self._on_end(name)

    def close(self) -> None:
        """End every actor."""
        self.end({*self._there, *self._placements})
