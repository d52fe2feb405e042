"""The actors of an online stage besides the rollout pool: policy, reference, critic and reward."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import Resources
from ...cluster.errors import DoesNotFit, WorkerFailed, WorkerLost
from ...cluster.placement import free_offers, node_of, place, release
from ...cluster.planning import Offer, amount
from ...cluster.process_group import Seat, open_store
from ...cluster.weights import WeightVersion
from ...rollout.inbox import Inbox
from ...rollout.places import Places
from ...rollout.records import Group
from ..stages import LearnerResources, OnlineStage
from .batch import TrainSample
from .checkpoints import Written
from .critic import CriticActor
from .policy import PolicyActor, PolicySpec, ReferenceActor
from .samples import write_samples
from .scoring import Scoring, Then

LOAD_SECONDS = 1800.0
"""How long an actor may take to load its model or its rewards once it has a place."""

END_SECONDS = 60.0
"""How long an actor that was ended may go on holding its name."""

KEEP_SECONDS = 2.0
"""How long those who stand hold up the choice of nodes for others; Ray tells of freed resources up to a second late."""

PULSE_SECONDS = 1.0
"""How long an actor has to answer for its life before others are placed; one that is busy may take longer."""

_STATELESS = {"max_restarts": 3, "max_task_retries": 3}
"""Ray starts these again elsewhere and repeats the call: what they answer depends on what they are asked alone."""

Tick = Callable[[], None]
"""Called at least twice a second during a wait; what it raises ends the wait."""


class Roles:
    """Starts the actors of a stage under names that `ray list actors` shows, and waits for what they do.

    Waiting raises `WorkerLost`, which names the actor and what it was doing, after the stage's `timeout_seconds`. The
    `tick` of waits that change the policy or the weights (update, publish, save) must not end them: a stop in the
    middle would leave step and weights apart.
    """

    def __init__(
        self,
        prefix: str,
        spec: PolicySpec,
        stage: OnlineStage,
        places: Places,
        *,
        samples: Path,
        wait_seconds: float,
        inbox: Inbox,
    ) -> None:
        self._prefix, self._spec, self._stage, self._samples = prefix, spec, stage, samples
        self._timeout, self._wait_seconds = stage.timeout_seconds, wait_seconds
        self._places = places
        self._placements: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._inbox = inbox
        self._scoring = Scoring(inbox, self._timeout)
        self._scorers: list[str] = []
        self._nodes: dict[str, str] = {}
        self._waits: list[Wait] = []
        self._meetings: dict[str, Any] = {}
        """The stores through which groups of ranks meet."""
        self._pulses: dict[str, Any] = {}
        """Open calls on those who learn, which end at once when their processes do."""
        self._written: dict[str, Written] = {}
        """What each of them said last of its checkpoints."""
        self.lost: set[str] = set()
        """Who died, hung or failed; `start` begins them anew after `end`."""

    def waiting(self) -> list[Wait]:
        """What is waited for from an actor now."""
        return [*self._waits, *self._scoring.waiting(self._prefix)]

    @contextmanager
    def _waiting(self, what: str, *names: str) -> Iterator[None]:
        """Say what is waited for while the block lasts, and note who is lost in it."""
        waits = [Wait(what, f"{self._prefix}{name}", self._nodes.get(name, ""), time.time()) for name in names]
        self._waits += waits
        try:
            yield
        except (WorkerLost, WorkerFailed):
            self.lost = self.lost or set(names)  # the first: a wait may end because `tick` found another one dead
            raise
        finally:
            self._waits = [wait for wait in self._waits if wait not in waits]

    def start(self, *, tick: Tick, placed: Callable[[], None] = lambda: None) -> bool:
        """Give every actor that is not there a place, begin them side by side, and wait until all are up.

        `placed` is called when all have their places and are on their way. Returns whether those who learn are new, and
        have learned nothing yet. Raises `DoesNotFit` for one without a place after `wait_seconds`, `WorkerLost` for one
        that is not up `LOAD_SECONDS` later, and what a constructor raised.
        """
        from ...rollout.rewards.scorer import Scorer

        stage = self._stage
        stateless = {} if self._places.wished else _STATELESS  # Ray would bind one whose node died to it for ever
        self._settle(tick)
        new = self._begin_group("policy", PolicyActor, stage.policy, tick)
        if stage.reference_role:
            self._begin("reference", ReferenceActor, stage.reference_role, (self._spec,), tick, **stateless)
        if stage.critic:
            self._begin_group("critic", CriticActor, stage.critic.resources, tick)
        for i in range(stage.scoring.workers):
            device = "cuda" if stage.scoring.resources.gpus else "cpu"
            given = (list(stage.rewards), Path("/"), stage.scoring.on_error, device)
            name = f"reward-{i}"
            if self._begin(name, Scorer, stage.scoring.resources, given, tick, **stateless):
                self._scoring.join(name, self._actors[name], self._nodes.get(name, ""))
        self._scorers = [f"reward-{i}" for i in range(stage.scoring.workers)]
        placed()
        others = [[name] for name in self._actors if name not in self.learners()]
        for names in [*self._groups(), *others]:
            self._answers(names, "its start", tick, self._call(names, "__ray_ready__"), timeout=LOAD_SECONDS)
        return new

    def _begin_group(self, role: str, shell: type, resources: LearnerResources, tick: Tick) -> bool:
        """Start the ranks of a role unless they are there; whether they were not."""
        if f"{role}-0" in self._actors:
            return False
        for rank, seat in enumerate(self._seats(role, resources.ranks)):
            self._begin(f"{role}-{rank}", shell, resources, (self._spec, seat), tick)
        return True

    def _seats(self, role: str, ranks: int) -> list[Seat | None]:
        """Where the ranks of a new group meet, on this node; one alone meets nobody."""
        if ranks == 1:
            return [None]
        import ray

        self._meetings[role] = store = open_store(ray.util.get_node_ip_address())
        name, times = f"{self._prefix}{role}", (LOAD_SECONDS, self._timeout)
        return [
            Seat(
                rank=r, size=ranks, host=store.host, port=store.port, name=name, meet_seconds=times[0], timeout=times[1]
            )
            for r in range(ranks)
        ]

    def _begin(
        self, name: str, role: type, resources: Resources, given: tuple[Any, ...], tick: Tick, **options: int
    ) -> bool:
        """Start an actor unless it is there; whether it was not."""
        if name in self._actors:
            return False
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        def cancelled() -> bool:
            tick()  # what it raises gives the place back
            self._settle_again()
            return False

        calls.wait_until_gone(f"{self._prefix}{name}", timeout=END_SECONDS, tick=tick)
        with self._waiting(f"a place with {amount(resources.cpus, resources.gpus)}", name):
            placement = place(
                f"{self._prefix}{name}",
                resources,
                self._wait_seconds,
                bounds=partial(self._places.bounds, name),
                cancelled=cancelled,
            )
        self._placements[name] = placement
        self._nodes[name] = node_of(placement) or ""
        actor = ray.remote(role).options(
            name=f"{self._prefix}{name}",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement),
            **options,
        )
        self._actors[name] = actor.remote(*given)
        return True

    def _settle(self, tick: Tick) -> None:
        """Where roles have wishes, choose the nodes of all actors that are missing. Raises `DoesNotFit`.

        Who learned nothing is started anew where he is dead. The others keep their places for a while; where that
        leaves no room, who learned nothing gives his up, and rollout workers follow.
        """
        began = time.monotonic()
        with self._waiting("nodes as the roles wish", "policy-0"):
            while self._places.wished:
                nodes, waited = free_offers(), time.monotonic() - began
                moving = waited > KEEP_SECONDS
                self.end(name for name in self._answering() if moving or not self._lives(name, nodes))
                try:
                    return self._places.choose(self._actors, nodes, moving=moving)
                except DoesNotFit as error:
                    if waited > self._wait_seconds:
                        raise DoesNotFit(f"{error}. That is what was free for {self._wait_seconds:g} s") from None
                tick()
                time.sleep(0.2)

    def _settle_again(self) -> None:
        """Choose other nodes where one that was chosen is lost before all have their places, as soon as there are."""
        if not self._places.wished or self._places.settled(self._actors, nodes := free_offers()):
            return
        for moving in (False, True):
            with suppress(DoesNotFit):
                return self._places.choose(self._actors, nodes, moving=moving)

    def _answering(self) -> list[str]:
        """Those who learn nothing, as far as they are there."""
        return [name for name in self._actors if name not in self.learners()]

    def _lives(self, name: str, nodes: Sequence[Offer]) -> bool:
        """Whether an actor's node is among these and it is not known to be dead; Ray takes a while to miss a node."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(ray.wait([self._actors[name].__ray_ready__.remote()], timeout=PULSE_SECONDS)[0])
        except RayError:
            return False
        return self._places.on(nodes, name)

    def look_after(self) -> None:
        """Hear of those who learn, while nothing else is asked of them, what they have written, or that they are dead.

        Raises `WorkerLost`, and `RunFailed` where one could not write.
        """
        import ray

        for name in self.learners():
            if name not in self._pulses:
                self._pulses[name] = self._actors[name].written.remote()
            if ray.wait([self._pulses[name]], timeout=0)[0]:
                pulse = self._pulses.pop(name)
                with self._waiting("a sign of life", name):
                    told = calls.get(pulse, actor=name, what="its idle time", timeout=0)
                self._written |= {name: told} if told else {}

    def score(self, group: Group, then: Then) -> None:
        """Have a group scored; `then` gets it with rewards. What goes wrong, `require_scores` raises."""
        self._scoring.score(group, then)

    def withdraw_scores(self) -> None:
        """Wait for no score that was asked for so far."""
        self._scoring.withdraw()

    def require_scores(self) -> None:
        """Raise what went wrong with the scoring of a group, if anything."""
        failed = self._scoring.failed()
        gone = {name for name, error in failed.items() if isinstance(error, (WorkerLost, WorkerFailed))}
        self.lost = self.lost or gone
        for error in failed.values():
            raise error

    def ask_scoring_troubles(self) -> dict[str, Any]:
        """Have the scorers count what went wrong in all they were given so far; for `scoring_troubles`."""
        return {name: self._actors[name].counters.remote() for name in self._scorers}

    def scoring_troubles(self, asked: dict[str, Any], *, tick: Tick) -> dict[str, float]:
        """Errors, overruns and dropped groups of all scorers since the start; empty while there are none."""
        counts: Counter[str] = Counter()
        for name, ref in asked.items():
            counts.update(self._answers([name], "its counters", tick, [ref])[0])
        return {f"scoring/{name}": value for name, value in counts.items() if name != "seconds"}

    def ask_reference(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        """Have the reference see samples, where there is one. For `reference_logprobs`."""
        names = ["reference"] if "reference" in self._actors else self._ranks("policy")
        return dict(zip(names, self._call(names, "reference_logprobs", samples), strict=True))

    def reference_logprobs(self, asked: dict[str, Any], *, tick: Tick) -> list[np.ndarray]:
        """The reference's log-probs `[T]` of each sample it was asked for."""
        return self._answers(list(asked), "the reference's log-probs", tick, list(asked.values()))[0]

    def values(self, samples: Sequence[TrainSample], *, tick: Tick) -> list[np.ndarray]:
        """The critic's values `[T]` of each sample, where there is a critic."""
        import ray

        return self._ask(self._ranks("critic"), "values", tick, "values", ray.put(samples))[0]

    def update(
        self, samples: Sequence[TrainSample], step: int, kl_coefficient: float, *, tick: Tick
    ) -> dict[str, float]:
        """The updates of a step, of policy and critic side by side; their metrics."""
        import ray

        what, held = f"the update of step {step}", ray.put(samples)  # once for all ranks
        critics, policies = self._ranks("critic"), self._ranks("policy")
        learning = self._call(critics, "update", held, step)
        told = self._ask(policies, what, tick, "update", held, step, kl_coefficient)[0]
        return told | self._answers(critics, what, tick, learning)[0] if critics else told

    def publish(self, version: int, workers: tuple[str, ...], *, tick: Tick) -> WeightVersion:
        """The policy's weights, in the object store."""
        return self._ask(self._ranks("policy"), f"publishing version {version}", tick, "publish", version, workers)[0]

    def publish_kept(self, version: int, folder: Path, *, tick: Tick) -> WeightVersion:
        """An earlier version as a checkpoint has it, in the object store again."""
        return self._ask(["policy-0"], f"publishing version {version}", tick, "publish_kept", version, folder)[0]

    def save(self, folder: Path, before: Sequence[WeightVersion], *, tick: Tick) -> None:
        """Have those who learn copy their state, and write it into the folder from then on.

        The versions before the policy's that steps still come from are written at once.
        """
        learners = self.learners()
        refs = self._call(learners, "save", folder)
        self._pulses.clear()  # what they say of the checkpoint before
        self._answers(learners, "a checkpoint", tick, refs)
        if before:
            self._ask(["policy-0"], "a checkpoint", tick, "keep", folder, before)

    def written(self, folder: Path) -> list[Written] | None:
        """What they wrote into the folder since `save`, once `look_after` or `finish_writing` has heard it of all."""
        learners = self.learners()
        found = [w for name in learners if (w := self._written.get(name)) and w.folder == folder]
        return found if found and len(found) == len(learners) else None

    def finish_writing(self, *, tick: Tick) -> None:
        """Wait until what `save` began is on the disk. Raises `RunFailed` where it could not be written."""
        learners = self.learners()
        told = self._ask(learners, "writing a checkpoint", tick, "written", True)
        self._written |= dict(zip(learners, told, strict=True))

    def load(self, folder: Path, *, tick: Tick) -> None:
        """Have policy and critic go on from a checkpoint."""
        for names in self._groups():
            self._ask(names, f"loading {folder}", tick, "load", folder)

    def learners(self) -> list[str]:
        """Those whose state a checkpoint holds: the ranks of policy and critic, as far as they are there."""
        return [name for names in self._groups() for name in names]

    def _groups(self) -> list[list[str]]:
        return [names for role in ("policy", "critic") if (names := self._ranks(role))]

    def _ranks(self, role: str) -> list[str]:
        return [name for name in self._actors if name.rpartition("-")[0] == role]

    def _ask(self, names: Sequence[str], what: str, tick: Tick, method: str, *given: Any) -> list[Any]:
        return self._answers(names, what, tick, self._call(names, method, *given))

    def _call(self, names: Sequence[str], method: str, *given: Any) -> list[Any]:
        return [getattr(self._actors[name], method).remote(*given) for name in names]

    def _answers(
        self, names: Sequence[str], what: str, tick: Tick, refs: Sequence[Any], *, timeout: float | None = None
    ) -> list[Any]:
        with self._waiting(what, *names):
            return self._inbox.get_together(
                dict(zip(names, refs, strict=True)), what=what, timeout=timeout or self._timeout, tick=tick
            )

    def write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's samples as parquet."""
        write_samples(self._samples, step, groups)

    def counts(self) -> dict[str, int]:
        """How many actors each role has."""
        there = {"reference": int("reference" in self._actors), "critic": len(self._ranks("critic"))}
        return {"policy": len(self._ranks("policy")), **there, "reward": len(self._scorers)}

    def end(self, names: Iterable[str]) -> None:
        """End these actors, whatever they are at, and give their places back."""
        for name in names:
            calls.end([actor] if (actor := self._actors.pop(name, None)) else [])
            if placement := self._placements.pop(name, None):
                release(placement)
            self._nodes.pop(name, None)
            self._pulses.pop(name, None)
            self._written.pop(name, None)
            self._scoring.leave(name)
        self.lost = set()

    def close(self) -> None:
        """End every actor."""
        self.end({*self._actors, *self._placements})
