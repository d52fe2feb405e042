"""The batches of the coming steps, on their way while the policy learns: generated, scored, seen by the reference.

Step t comes from weight version max(0, t − staleness), whatever is ready sooner. So what a batch holds depends on
recipe and seed alone, and with staleness 0 no step begins before the version of the step before it is there.

With partial rollouts every completion under way gets so many tokens a step. A step draws its prompts, goes on with the
groups that the step before left, and trains on those of both whose completions are all finished then; the others it
leaves to the next. So it is counts of tokens that say what is carried, never who was late.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ...cluster.weights import WeightStore, WeightVersion
from ...rollout.ledger import GroupState, Ledger
from ...rollout.pool import RolloutPool
from ...rollout.records import Group, Origin
from ..schedule import rows_drawn
from ..stages import OnlineStage
from .experience import chosen, every_sample, further_prompts, has_variance, shaped
from .roles import Roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A row of the data with its prompt's token ids `[P]`, and those of its own answer `[T]` where it is learned."""

    ids: np.ndarray
    row: dict[str, Any]
    answer: np.ndarray | None = None

    def group(self, origin: Origin) -> Group:
        """A group of it, as a step draws it."""
        step, index, _ = origin
        return Group(step=step, index=index, prompt=self.ids, row=self.row, answer=self.answer, origin=origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What batches are drawn from, and who makes them."""

    stage: OnlineStage
    prompts: Sequence[Prompt]
    seed: int
    pool: RolloutPool
    roles: Roles


class Start(NamedTuple):
    """Where a step begins: how many prompts were drawn before it, and the groups that it goes on with."""

    drawn: int
    carried: Sequence[Group] = ()


class Batch:
    """A step's groups on their way, each scored once finished; dynamic sampling draws until enough have variance."""

    def __init__(self, source: Source, step: int, start: Start, weights: WeightVersion) -> None:
        self._source, self._start, self._weights = source, start, weights
        self.began = time.time()
        """Seconds since the epoch."""
        self.ledger = Ledger(step, 0, weights.version, weights.digest)
        self.full = False
        """Whether all that is drawn is scored, and no more is drawn."""
        self.groups: list[Group] = []
        """Of a full batch those that the update may learn from, in ledger order."""
        self.reference: dict[str, Any] = {}
        """The reference's calls on the samples of `groups`, where there is a reference."""
        self.troubles: Any = None
        """The scorers' calls for their counters."""
        self._generate([*self._go_on(start.carried), *self._draw(source.stage.prompts_per_step)])

    @property
    def generated(self) -> bool:
        """Whether all that is drawn so far is generated."""
        return self.ledger.complete(GroupState.GENERATED)

    @property
    def finished(self) -> list[Group]:
        """The groups that have come and are finished, in ledger order."""
        return self.ledger.batch()

    @property
    def carried(self) -> list[Group]:
        """The groups that have come and are not: the next step goes on with them."""
        return self.ledger.left()

    @property
    def drawn(self) -> int:
        """How many prompts the step has drawn."""
        return self.ledger.size - len(self._start.carried)

    @property
    def left(self) -> Start | None:
        """Where the next step begins; none while that depends on scores or tokens to come."""
        stage = self._source.stage
        known = self.full if stage.dynamic_sampling else self.generated or not stage.partial_tokens
        if not known:
            return None
        return Start(self._start.drawn + self.drawn, self.carried)

    def advance(self) -> None:
        """Once all that was drawn is scored: draw more, or have the batch's samples seen by the reference."""
        if self.full or not self.ledger.complete(GroupState.SCORED):
            return
        stage, roles, finished = self._source.stage, self._source.roles, self.finished
        if stage.dynamic_sampling:
            # what is carried may have variance yet: it is not drawn again meanwhile
            wanted, found = stage.prompts_per_step, sum(map(has_variance, finished)) + len(self.carried)
            if count := further_prompts(wanted, found, self.drawn, wanted * stage.dynamic_sampling.limit):
                self._generate(self._draw(count))
                return
        self.full, self.groups = True, shaped(chosen(finished, stage), stage)
        self.troubles = roles.ask_scoring_troubles()
        if stage.has_reference:
            self.reference = roles.ask_reference(every_sample(self.groups))

    def _draw(self, count: int) -> list[Group]:
        source, step, before = self._source, self.ledger.step, self._start.drawn + self.drawn
        first, rows = self.ledger.extend(count), rows_drawn(source.seed, len(source.prompts), before, count)
        return [source.prompts[row].group(Origin(step, first + i, row)) for i, row in enumerate(rows)]

    def _go_on(self, carried: Sequence[Group]) -> list[Group]:
        first, step = self.ledger.extend(len(carried)), self.ledger.step
        return [replace(group, step=step, index=first + i) for i, group in enumerate(carried)]

    def _generate(self, groups: Sequence[Group]) -> None:
        tasks = [replace(group, budget=self._source.stage.partial_tokens) for group in groups]
        self._source.pool.begin(tasks, self.ledger, self._weights, self._take)

    def _take(self, group: Group) -> None:
        if group.finished:
            self._source.roles.score(group, self.ledger.scored)
        else:
            self.ledger.carried(group)


class Ahead:
    """The batches under way, oldest first: as many as have their weights and know where they begin."""

    def __init__(self, source: Source, weights: WeightStore) -> None:
        self._source, self._weights = source, weights
        self._batches: deque[Batch] = deque()
        self._step: int | None = None
        """The next to begin; none while nothing is to be made."""
        self._start: Start | None = None
        """Where it begins; none while that is not known."""

    def begin(self, step: int, start: Start) -> None:
        """Make the batches from a step on, which begins there; those under way are given up."""
        self.close()
        self._step, self._start = step, start
        self.advance()

    def close(self) -> None:
        """Give up what is under way, and begin nothing more."""
        self._source.pool.withdraw()
        self._source.roles.withdraw_scores()
        self._batches.clear()
        self._step = None

    def advance(self) -> None:
        """Take in what has come, and begin what can begin; never waits. Whoever waits for something calls it often."""
        self._source.pool.advance()
        for batch in self._batches:
            batch.advance()
        while self._step is not None and self._step < self._source.stage.steps and self._weights.has(self._step):
            if self._batches:
                self._start = self._batches[-1].left
            if self._start is None:
                return
            self._batches.append(Batch(self._source, self._step, self._start, self._weights.of_step(self._step)))
            self._step += 1

    @property
    def first(self) -> Batch:
        """The oldest batch."""
        return self._batches[0]

    @property
    def newest_step(self) -> int | None:
        """The step whose batch began last, of those under way."""
        return self._batches[-1].ledger.step if self._batches else None

    def counts(self) -> dict[str, int]:
        """How many groups of the oldest batch are in each state."""
        return self._batches[0].ledger.counts() if self._batches else {}

    def unfinished(self) -> int:
        """How many groups of the oldest batch no worker has finished."""
        return sum(n for state, n in self.counts().items() if state in (GroupState.PENDING, GroupState.RUNNING))

    def trained(self) -> None:
        """The oldest batch is trained on."""
        batch = self._batches.popleft()
        batch.ledger.trained()
        if not self._batches:
            self._start = batch.left
