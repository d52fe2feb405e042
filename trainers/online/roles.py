"""The actors of an online stage besides the rollout pool: policy, reference, critic and reward."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...cluster import calls
from ...cluster.calls import Wait
from ...cluster.config import Resources
from ...cluster.errors import WorkerFailed, WorkerLost
from ...cluster.placement import node_of, release, reserve
from ...cluster.process_group import Seat, open_store
from ...cluster.weights import WeightVersion
from ...rollout.fleet import Note
from ...rollout.inbox import Inbox
from ...rollout.places import Places
from ...rollout.records import Group
from ..stages import LearnerResources, OnlineStage
from .actors import Actors, Tick
from .batch import TrainSample
from .checkpoints import Written
from .critic import CriticActor
from .policy import PolicyActor, PolicySpec, ReferenceActor
from .samples import write_samples
from .scorers import LOAD_SECONDS, Coming, Scorers
from .scoring import Scoring, Then

_STATELESS = {"max_restarts": 3, "max_task_retries": 3}
"""Ray starts these again elsewhere and repeats the call: what they answer depends on what they are asked alone."""


class Roles:
    """Starts the actors of a stage under names that `ray list actors` shows, and waits for what they do.

    Waiting raises `WorkerLost`, which names the actor and what it was doing, after the stage's `timeout_seconds`. The
    `tick` of waits that change the policy or the weights (update, publish, save) must not end them: a stop in the
    middle would leave step and weights apart.
    """

    crew: Callable[..., Actors] = Actors
    """What starts the actors."""

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
        note: Note,
    ) -> None:
        self._prefix, self._spec, self._stage, self._samples = prefix, spec, stage, samples
        self._wished, timeout = places.wished, stage.timeout_seconds
        self._actors = self.crew(prefix, places, inbox, wait_seconds=wait_seconds, timeout=timeout, on_end=self._ended)
        self._scoring = Scoring(inbox, timeout)
        self.scorers = Scorers(stage.scoring.workers, self, self._scoring, inbox, note)
        self._meetings: dict[str, Any] = {}
        """The stores through which groups of ranks meet."""
        self._pulses: dict[str, Any] = {}
        """Open calls on those who learn, which end at once when their processes do."""
        self._written: dict[str, Written] = {}
        """What each of them said last of its checkpoints."""

    @property
    def lost(self) -> set[str]:
        """Who died, hung or failed; `start` begins them anew after `end`."""
        return self._actors.lost

    def waiting(self) -> list[Wait]:
        """What is waited for from an actor now."""
        return [*self._actors.waits, *self._scoring.waiting(self._prefix)]

    def coming(self) -> list[Wait]:
        """Scorers that were asked for while the run goes on and are not up yet."""
        return self.scorers.waiting(self._prefix)

    def start(self, *, tick: Tick, placed: Callable[[], None] = lambda: None) -> bool:
        """Give every actor that is not there a place, begin them side by side, and wait until all are up.

        `placed` is called when all have their places and are on their way. Returns whether those who learn are new, and
        have learned nothing yet. Raises `DoesNotFit` for one without a place after `wait_seconds`, `WorkerLost` for one
        that is not up `LOAD_SECONDS` later, and what a constructor raised.
        """
        stage = self._stage
        self.scorers.close()  # one on its way must not take the place of who is missing
        stateless = {} if self._wished else _STATELESS  # Ray would bind one whose node died to it for ever
        self._actors.settle(self._answering, tick)
        new = self._begin_group("policy", PolicyActor, stage.policy, tick)
        if stage.reference_role:
            self._actors.begin("reference", ReferenceActor, stage.reference_role, (self._spec,), tick, **stateless)
        if stage.critic:
            self._begin_group("critic", CriticActor, stage.critic.resources, tick)
        for name in self.scorers.missing():
            self._actors.begin(name, *self._scorer(), tick, **stateless, **self._scoring_at_once())
            self.scorers.join(name, self._actors[name], self._actors.node(name))
        placed()
        others = [[name] for name in self._answering() if not self.scorers.leaves(name)]
        for names in [*self._groups(), *others]:
            self._actors.answers(
                names, "its start", tick, self._actors.call(names, "__ray_ready__"), timeout=LOAD_SECONDS
            )
        self.scorers.steady = True
        return new

    def _scorer(self) -> tuple[type, Resources, tuple[Any, ...]]:
        """What a scorer is: its class, what it reserves, and what it is made with."""
        from ...rollout.rewards.scorer import Scorer

        scoring = self._stage.scoring
        device = "cuda" if scoring.resources.gpus else "cpu"
        return Scorer, scoring.resources, (list(self._stage.rewards), Path("/"), scoring.on_error, device)

    def _scoring_at_once(self) -> dict[str, int]:
        """How many groups a scorer works at, where its rewards have room for several, and a call for what it counts."""
        from ...rollout.rewards.scorer import groups_at_once

        groups = groups_at_once(self._stage.rewards, self._stage.rollout.group_size)
        return {"max_concurrency": groups + 1} if groups > 1 else {}

    def ask_for_scorer(self, name: str) -> Coming:
        """Ask for another scorer and a place for it; returns at once."""
        role, resources, given = self._scorer()
        placement = reserve(f"{self._prefix}{name}", resources)
        try:
            return Coming(
                self._actors.made(name, role, resources, given, placement, **_STATELESS, **self._scoring_at_once()),
                placement,
            )
        except BaseException:
            release(placement)
            raise

    def keep(self, name: str, coming: Coming) -> str:
        """Count a scorer that is up among the actors; gives its node."""
        self._actors.keep(name, coming.actor, coming.placement)
        return self._actors.node(name)

    def stands(self, coming: Coming) -> bool:
        """Whether a scorer on its way has its place."""
        return node_of(coming.placement) is not None

    def give_up(self, coming: Coming) -> None:
        """End a scorer that was on its way."""
        calls.end([coming.actor])
        release(coming.placement)

    def _begin_group(self, role: str, shell: type, resources: LearnerResources, tick: Tick) -> bool:
        """Start the ranks of a role unless they are there; whether they were not."""
        if f"{role}-0" in self._actors:
            return False
        for rank, seat in enumerate(self._seats(role, resources.ranks)):
            self._actors.begin(f"{role}-{rank}", shell, resources, (self._spec, seat), tick)
        return True

    def _seats(self, role: str, ranks: int) -> list[Seat | None]:
        """Where the ranks of a new group meet, on this node; one alone meets nobody."""
        if ranks == 1:
            return [None]
        import ray

        self._meetings[role] = store = open_store(ray.util.get_node_ip_address())
        name, times = f"{self._prefix}{role}", (LOAD_SECONDS, self._stage.timeout_seconds)
        return [
            Seat(
                rank=r, size=ranks, host=store.host, port=store.port, name=name, meet_seconds=times[0], timeout=times[1]
            )
            for r in range(ranks)
        ]

    def _answering(self) -> list[str]:
        """Those who learn nothing, as far as they are there."""
        learners = self.learners()
        return [name for name in self._actors.names if name not in learners]

    def look_after(self) -> None:
        """Hear of those who learn, while nothing else is asked of them, what they have written, or that they are dead;
        move towards as many scorers as are asked for.

        Raises `WorkerLost`, and `RunFailed` where one could not write.
        """
        import ray

        self.scorers.reconcile()
        for name in self.learners():
            if name not in self._pulses:
                self._pulses[name] = self._actors[name].written.remote()
            if ray.wait([self._pulses[name]], timeout=0)[0]:
                pulse = self._pulses.pop(name)
                with self._actors.waiting_for("a sign of life", name):
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
        self._actors.lost = self.lost or gone
        for error in failed.values():
            raise error

    def ask_scoring_troubles(self) -> tuple[Counter[str], dict[str, Any]]:
        """Have the scorers count what went wrong in all they were given so far; for `scoring_troubles`."""
        return self.scorers.ask_counters()

    def scoring_troubles(self, asked: tuple[Counter[str], dict[str, Any]], *, tick: Tick) -> dict[str, float]:
        """Errors, overruns and dropped groups of all scorers since the start, as far as there are any, and the seconds
        of each reward."""
        counts, refs = asked
        for name, ref in refs.items():
            counts.update(self._actors.answers([name], "its counters", tick, [ref])[0])
        return {f"scoring/{name}": value for name, value in counts.items() if name != "seconds"}

    def ask_reference(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        """Have the reference see samples, where there is one. For `reference_logprobs`."""
        names = ["reference"] if "reference" in self._actors else self._actors.of("policy")
        return dict(zip(names, self._actors.call(names, "reference_logprobs", samples), strict=True))

    def reference_logprobs(self, asked: dict[str, Any], *, tick: Tick) -> list[np.ndarray]:
        """The reference's log-probs `[T]` of each sample it was asked for."""
        return self._actors.answers(list(asked), "the reference's log-probs", tick, list(asked.values()))[0]

    def values(self, samples: Sequence[TrainSample], *, tick: Tick) -> list[np.ndarray]:
        """The critic's values `[T]` of each sample, where there is a critic."""
        import ray

        return self._actors.ask(self._actors.of("critic"), "values", tick, "values", ray.put(samples))[0]

    def update(
        self, samples: Sequence[TrainSample], step: int, kl_coefficient: float, *, tick: Tick
    ) -> dict[str, float]:
        """The updates of a step, of policy and critic side by side; their metrics."""
        import ray

        what, held = f"the update of step {step}", ray.put(samples)  # once for all ranks
        critics, policies = self._actors.of("critic"), self._actors.of("policy")
        learning = self._actors.call(critics, "update", held, step)
        told = self._actors.ask(policies, what, tick, "update", held, step, kl_coefficient)[0]
        return told | self._actors.answers(critics, what, tick, learning)[0] if critics else told

    def publish(self, version: int, workers: tuple[str, ...], *, tick: Tick) -> WeightVersion:
        """The policy's weights, in the object store."""
        return self._actors.ask(
            self._actors.of("policy"), f"publishing version {version}", tick, "publish", version, workers
        )[0]

    def publish_kept(self, version: int, folder: Path, *, tick: Tick) -> WeightVersion:
        """An earlier version as a checkpoint has it, in the object store again."""
        return self._actors.ask(["policy-0"], f"publishing version {version}", tick, "publish_kept", version, folder)[0]

    def save(self, folder: Path, before: Sequence[WeightVersion], *, tick: Tick) -> None:
        """Have those who learn copy their state, and write it into the folder from then on.

        The versions before the policy's that steps still come from are written at once.
        """
        learners = self.learners()
        refs = self._actors.call(learners, "save", folder)
        self._pulses.clear()  # what they say of the checkpoint before
        self._actors.answers(learners, "a checkpoint", tick, refs)
        if before:
            self._actors.ask(["policy-0"], "a checkpoint", tick, "keep", folder, before)

    def written(self, folder: Path) -> list[Written] | None:
        """What they wrote into the folder since `save`, once `look_after` or `finish_writing` has heard it of all."""
        learners = self.learners()
        found = [w for name in learners if (w := self._written.get(name)) and w.folder == folder]
        return found if found and len(found) == len(learners) else None

    def finish_writing(self, *, tick: Tick) -> None:
        """Wait until what `save` began is on the disk. Raises `RunFailed` where it could not be written."""
        learners = self.learners()
        told = self._actors.ask(learners, "writing a checkpoint", tick, "written", True)
        self._written |= dict(zip(learners, told, strict=True))

    def load(self, folder: Path, *, tick: Tick) -> None:
        """Have policy and critic go on from a checkpoint."""
        for names in self._groups():
            self._actors.ask(names, f"loading {folder}", tick, "load", folder)

    def learners(self) -> list[str]:
        """Those whose state a checkpoint holds: the ranks of policy and critic, as far as they are there."""
        return [name for names in self._groups() for name in names]

    def _groups(self) -> list[list[str]]:
        return [names for role in ("policy", "critic") if (names := self._actors.of(role))]

    def write_samples(self, step: int, groups: Sequence[Group], folder: str = "") -> None:
        """Keep a step's samples as parquet, those that were not trained on in a folder of their own."""
        write_samples(self._samples / folder, step, groups)

    def counts(self) -> dict[str, int]:
        """How many actors each role has."""
        there = {"reference": int("reference" in self._actors), "critic": len(self._actors.of("critic"))}
        return {"policy": len(self._actors.of("policy")), **there, "reward": self.scorers.count}

    def end(self, names: Iterable[str]) -> None:
        """End these actors, whatever they are at, and give their places back."""
        self._actors.end(names)

    def end_one(self, name: str) -> None:
        """End an actor, and nobody counts as less lost for it."""
        self._actors.end_one(name)

    def _ended(self, name: str) -> None:
        self._pulses.pop(name, None)
        self._written.pop(name, None)
        self.scorers.gone(name)

    def close(self) -> None:
        """End every actor."""
        self.scorers.close()
        self._actors.close()
