"""The online loop, written once: sample → score → advantage → update → publish.

The controller decides and holds no tensors: roles are actors (`policy`, `reference`, `critic`, `reward`, `rollout`),
the pool gives out groups, the ledger counts them. What a step yields depends on the seed and the step alone. Batches
are on their way ahead of the update that waits for them (`ahead.py`), as far as the recipe's staleness lets their
weights be older than the policy.

A request to stop is heard while actors start and in a step before its update (until the values of a critic): what is
lost is made again, the same, on resume. From the update to the publication it is not, so that the step and the weights
of a checkpoint agree; those waits end by their time-outs. Workers come, go and are replaced during all of them.

A role that dies, hangs or fails is started anew, and the step under way is made again. The policy goes on from the last
checkpoint then, and what it had learned since is learned again, bit for bit: the weight store holds it to that.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...cluster.calls import Wait
from ...cluster.errors import RaylignError, WorkerFailed, WorkerLost
from ...cluster.rundir import RunDir
from ...cluster.weights import WeightStore, WeightVersion
from ...rollout.pool import RolloutPool
from ...rollout.records import Group
from ..interrupt import StopRequested, stop_if_asked
from ..stages import OnlineStage
from .ahead import Ahead, Batch, Prompt, Source, Start
from .balance import Balance
from .batch import TrainSample, trained
from .carried import kept_carried
from .checkpoints import Checkpoints
from .experience import annotated, every_sample, shaped, train_samples
from .held_out import HeldOut
from .keeping import Keeping
from .metrics import advantage_metrics, group_metrics, kl_metrics, spans_by_worker, time_metrics
from .phases import Phases
from .progress import Progress
from .record import Record
from .roles import Roles

_LEARNING = ("reference", "values", "update", "publish")
"""Phases in which workers wait for the step's end, or would, if the next step did not overlap."""


class OnlineLoop:
    """Trains one stage; `run` returns the finished steps, `stopped` says whether it was asked to end early."""

    def __init__(
        self,
        stage: OnlineStage,
        name: str,
        *,
        prompts: Sequence[Prompt],
        roles: Roles,
        pool: RolloutPool,
        run: RunDir,
        checkpoints: Path,
        seed: int,
        on_metrics: Callable[[int, dict[str, float]], None],
        held_out: HeldOut | None = None,
    ) -> None:
        self._stage, self._name = stage, name
        self._roles, self._pool, self._run = roles, pool, run
        self._prompts, self._held_out = prompts, held_out
        self._record = Record(run, name, stage, on_metrics)
        self._kept = Checkpoints(checkpoints, stage, {"seed": seed, "rows": len(prompts), "stage": name})
        self._weights = WeightStore(staleness=stage.staleness, exact=stage.rollout.is_exact)
        source = Source(stage=stage, prompts=prompts, seed=seed, pool=pool, roles=roles)
        self._ahead = Ahead(source, self._weights)
        self._progress = Progress.at_start(stage)
        self._phases = Phases(run, lambda: self._say(self.step))
        self._keeping = Keeping(self._kept, roles, self._weights, run, name, self._look_after)
        self._last_tick = 0.0
        self._placed = False
        """Whether the roles have places, so that rollout workers may take theirs."""
        self._begun = False
        """Whether any weights have been published."""
        self._agree = False
        """Whether the policy holds what `step` says; a checkpoint of it is sound then."""
        workers = stage.rollout.workers
        self._balance = Balance(workers.min, workers.max) if workers.auto else None
        self._balanced: int | None = None
        """How many workers are wanted by the times of the last steps."""
        self._generating = 0, 0.0
        """How many workers made the step's samples, in how many seconds of theirs together."""
        self._failures, self._failed_at = 0, -1
        self.restarts = 0
        """How often roles were started anew."""
        self.step = 0
        self.stopped = False
        self.workers_seen = (pool.target, pool.target)

    @property
    def weights(self) -> WeightVersion:
        """The version published last. Raises `RunFailed` before the first."""
        return self._weights.current

    @property
    def last_metrics(self) -> dict[str, float]:
        """Those of the last step, with the last measurement on held-out prompts."""
        return self._record.last

    @property
    def version(self) -> int:
        """The number of the version published last; 0 before the first."""
        return self._weights.current.version if self._begun else 0

    def run(self) -> None:
        """Start the roles and go on from the last checkpoint, if any, to the last step or until asked to stop.

        Roles that are lost are started anew, at most `max_failures` times without a finished step in between. What ends
        it early says which checkpoint `raylign resume` goes on from.
        """
        try:
            while not self.stopped and not self._went_on():
                pass
        except Exception as error:
            self._keeping.let_go()
            if not isinstance(error, RaylignError):
                raise
            raise type(error)(f"{error}; {self._kept.way_on(self._name, self._run.argument)}") from error
        finally:
            self._ahead.close()
        self._run.update_status(waiting=[])

    def _went_on(self) -> bool:
        """Train until the last step, a stop, or the loss of a role, which is replaced; whether the stage is done."""
        try:
            try:
                self._go_on()
            except StopRequested:
                self.stopped = True
                self._ahead.close()
                self._checkpoint()
            self._finish_checkpoint()
        except (WorkerLost, WorkerFailed) as error:
            self._replace_lost(error)
            return False
        return True

    def _go_on(self) -> None:
        """Start the roles that are not there, and train to the last step from where the policy is."""
        if self._roles.start(tick=self._tick, placed=self._bring_workers):
            self._restore()
        if self._pool.size:
            self._pool.set_weights(self._weights.current)
        else:
            self._pool.start(self._weights.current, tick=self._tick)
        self._ahead.begin(self.step, Start(self._progress.drawn, self._progress.carried))
        self._measure()
        while self.step < self._stage.steps and not self._record.is_over():
            stop_if_asked(self._run)
            self._follow()
            self._train_step(self.step)
            self.step, self._agree = self.step + 1, True
            self._measure()
            if self._kept.due(self.step) or self._record.is_over():
                self._checkpoint()
        if self.step < self._stage.steps:
            self._ahead.close()
            self._run.event("ended_early", stage=self._name, step=self.step)

    def _bring_workers(self) -> None:
        """Have rollout workers load their models while the roles load theirs."""
        self._placed = True
        self._follow()
        self._pool.prepare()

    def _replace_lost(self, error: RaylignError) -> None:
        """End the roles that were lost, and all who learn where one of them was, or they are in the middle of a step.

        Raises `error` where none was, or that happens too often without a finished step in between.
        """
        self._ahead.close()
        lost, learners = self._roles.lost, set(self._roles.learners())
        self._agree = self._agree and not lost & learners
        lost = lost if self._agree or not lost else lost | learners
        self._failures = 1 if self.step > self._failed_at else self._failures + 1
        self._failed_at = max(self._failed_at, self.step)
        if not lost or self._failures > self._stage.max_failures:
            raise error
        self.restarts += 1
        self._phases.seconds = {}
        if lost & learners:
            self._kept.drop()  # nobody writes it any more
        self._run.event("role_lost", stage=self._name, step=self.step, roles=sorted(lost), reason=str(error))
        self._roles.end(lost)

    def _train_step(self, step: int) -> None:
        batch = self._sample(step)
        groups = self._reference(batch)
        samples = self._advantage(self._values(groups))
        learned = self._update(samples, step) | advantage_metrics(samples)
        learned["samples/trained"] = float(len(trained(samples, self._stage)))
        self._publish(step + 1, changed=bool(learned.pop("updated")))
        self._ahead.trained()
        learned |= self._roles.scoring_troubles(batch.troubles, tick=self._look_after)
        self._note(batch, groups, learned)
        self._progress = self._progress.after(batch.drawn, groups, self._stage, batch.carried)

    def _sample(self, step: int) -> Batch:
        """The step's batch, generated and scored; it is on its way already, and those after it meanwhile."""
        batch = self._ahead.first
        while True:
            with self._phases("generate", self.step, since=batch.began):
                self._wait_until(lambda: batch.generated)
            with self._phases("score", self.step, lane="reward-0"):
                self._wait_until(lambda: batch.full or not batch.generated)
            if batch.full:
                break
        spans = spans_by_worker([*batch.finished, *batch.carried])
        self._generating = len(spans), sum(end - start for start, end in spans.values())
        for worker, (start, end) in spans.items():
            self._run.span(worker.rpartition("/")[2], "generate", start, end, step=step)
        return batch

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        while True:
            self._tick()
            self._roles.require_scores()
            if reached():
                return
            self._pool.turn(lambda: None)

    def _reference(self, batch: Batch) -> list[Group]:
        """The batch's groups with the reference's log-probs of every sample, where there is a reference."""
        if not self._stage.has_reference:
            return batch.groups
        with self._phases("reference", self.step, lane="reference"):
            logprobs = self._roles.reference_logprobs(batch.reference, tick=self._tick)
            return annotated(batch.groups, "reference", logprobs)

    def _values(self, groups: list[Group]) -> list[Group]:
        """The groups with the critic's value of every token, where there is a critic."""
        if not self._stage.critic:
            return groups
        with self._phases("values", self.step, lane="critic-0"):
            return annotated(groups, "values", self._roles.values(every_sample(groups), tick=self._tick))

    def _advantage(self, groups: list[Group]) -> list[TrainSample]:
        """What the update trains on."""
        return train_samples(groups, self._stage, self._progress.kl_coefficient)

    def _update(self, samples: list[TrainSample], step: int) -> dict[str, float]:
        self._agree = False
        with self._phases("update", self.step, lane="policy-0"):
            return self._roles.update(samples, step, self._progress.kl_coefficient, tick=self._look_after)

    def _publish(self, version: int, *, changed: bool) -> None:
        """Make the policy's weights the next version; rollout workers prove that they hold it before they use it."""
        with self._phases("publish", self.step, lane="policy-0"):
            published = self._roles.publish(version, self._pool.names, tick=self._look_after)
            self._weights.publish(published, changed=changed)
            if published.parcel.note:
                self._run.event("weights_regrouped", version=version, reason=published.parcel.note)
            self._pool.set_weights(published)
            self._ahead.advance()

    def _measure(self) -> None:
        """Have the held-out prompts answered, where that is due now and was not done."""
        if not self._held_out or not self._held_out.due(self.step) or self._record.measured(self.step):
            return
        with self._phases("held_out", self.step):
            asked = self._held_out.ask(self.step, self._weights.current)
            self._wait_until(lambda: asked.answered)
        metrics = asked.metrics()
        self._roles.write_samples(self.step, asked.groups, "held_out")
        self._kept.note(metrics)
        self._record.held_out(self.step, metrics)

    def _note(self, batch: Batch, groups: list[Group], learned: dict[str, float]) -> None:
        """Write what the step was like; `groups` are those it learned from."""
        step, finished, scored = batch.ledger.step, batch.finished, shaped(batch.finished, self._stage)
        metrics = group_metrics(finished, scored) | kl_metrics(groups, self._progress.kl_coefficient) | learned
        metrics["groups/drawn"] = float(batch.drawn)
        metrics["groups/carried"] = float(len(batch.carried))
        metrics |= time_metrics(self._phases.seconds, metrics.get("tokens", 0.0))
        metrics["version"] = float(self._weights.current.version)
        metrics["weights/bytes"] = float(self._weights.current.parcel.size)
        metrics["queue/groups"] = float(self._ahead.unfinished())
        metrics["restarts/rollout"], metrics["restarts/roles"] = float(self._pool.restarts), float(self.restarts)
        metrics["workers/rollout"], metrics["workers/reward"] = float(self._pool.size), float(self._roles.scorers.count)
        low, high = self.workers_seen
        self.workers_seen = (min(low, self._pool.size), max(high, self._pool.size))
        self._kept.note(metrics)
        self._roles.write_samples(step, scored)
        self._balance_workers()
        self._phases.seconds = {}
        self._record.step(step, metrics)
        self._say(step + 1)

    def _balance_workers(self) -> None:
        """Where the recipe says so: have as many workers as the step's times ask for, until users ask for a number."""
        if not self._balance:
            return
        learning = sum(self._phases.seconds.get(phase, 0.0) for phase in _LEARNING)
        self._balanced = self._balance.step(*self._generating, learning)

    def _restore(self) -> None:
        """Have a new policy go on from the last checkpoint, if any, and publish what it holds then."""
        checkpoint, broken = self._kept.latest()
        for name in broken:
            self._run.event("checkpoint_refused", checkpoint=name, reason="its files do not match its manifest")
        self.step = checkpoint.step if checkpoint else 0
        self._progress = Progress.at_start(self._stage)
        if checkpoint:
            self._progress = Progress.of(checkpoint, kept_carried(checkpoint.path, self._prompts))
            self._roles.load(checkpoint.path, tick=self._tick)
        published = self._roles.publish(self.step, (), tick=self._tick)
        before = []
        if checkpoint:
            due = range(self._weights.due(self.step), self.step)
            before = [self._roles.publish_kept(version, checkpoint.path, tick=self._tick) for version in due]
        self._weights.begin_at(published, before)
        if checkpoint:
            checkpoint.refuse_another(digest=published.digest)
        self._record.begin_at(self.step)
        if checkpoint or self._begun:
            self._run.event("resumed", stage=self._name, step=self.step)
        self._begun = self._agree = True

    def _checkpoint(self) -> None:
        """Begin to save the step, unless that was done already or the policy does not hold it."""
        if self._kept.newest == self.step or not self._agree:
            return
        self._finish_checkpoint()
        with self._phases("checkpoint", self.step):
            self._keeping.begin(self.step, self._progress)

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint under way, if any."""
        if self._kept.draft:
            with self._phases("checkpoint", self.step):
                self._keeping.finish(wait=True)

    def _tick(self) -> None:
        """Look after the run and, at most twice a second, hear a request to stop. Raises `StopRequested`."""
        if self._due():
            stop_if_asked(self._run)
        self._look_after()

    def _look_after(self) -> None:
        """Move the batches on; at most twice a second follow a request to scale, finish a checkpoint, see who is lost,
        and say where the run is.

        Raises `WorkerLost` where the policy is gone.
        """
        if self._placed:
            self._ahead.advance()
        if self._due():
            self._last_tick = time.monotonic()
            self._roles.look_after()
            self._keeping.finish()
            self._follow()
            self._say(self.step)

    def _due(self) -> bool:
        return time.monotonic() - self._last_tick >= 0.5

    def _follow(self) -> None:
        """Have as many workers and scorers as users ask for."""
        if not self._placed:
            return
        desired = self._run.desired()
        for role, crew in (("rollout", self._pool), ("reward", self._roles.scorers)):
            wanted, before = desired.get(role) or (self._balanced if role == "rollout" else None), crew.target
            if wanted and wanted != before and crew.scale(wanted) != before:
                self._run.event("scaled", role=role, before=before, after=crew.target)

    def _say(self, step: int) -> None:
        """Write where the run is and what it waits for; before the first weights there is nothing but waits to tell."""
        told: dict[str, Any] = {"waiting": [asdict(wait) for wait in self._waiting()]}
        if self._begun:
            told |= {
                "stage": self._name,
                "step": step,
                "steps": self._stage.steps,
                "workers": {"rollout": self._pool.size} | self._roles.counts(),
                "wanted": {"rollout": self._pool.target, "reward": self._roles.scorers.target},
                "generating": self._ahead.newest_step,
                "groups": self._ahead.counts(),
                **self._record.told(),
            }
        self._run.update_status(**told)

    def _waiting(self) -> list[Wait]:
        """What actors are at for the run, and the phase of the step until one has begun something for it.

        Scorers may have begun before the phase that waits for them.
        """
        roles, workers = self._roles.waiting(), [*self._pool.waiting(), *self._roles.coming()]
        now = self._phases.now
        if now and not roles and all(wait.since < now.since for wait in workers):
            return [*workers, now]
        return [*roles, *workers]
