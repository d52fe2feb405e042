"""The batches of the coming steps, on their way while the policy learns: generated, scored, seen by the reference.

Step t comes from weight version max(0, t − staleness), whatever is ready sooner. So what a batch holds depends on
recipe and seed alone, and with staleness 0 no step begins before the version of the step before it is there.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cluster.weights import WeightStore, WeightVersion
from ...rollout.ledger import GroupState, Ledger
from ...rollout.pool import RolloutPool
from ...rollout.records import Group
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What batches are drawn from, and who makes them."""

    stage: OnlineStage
    prompts: Sequence[Prompt]
    seed: int
    pool: RolloutPool
    roles: Roles


class Batch:
    """A step's groups on their way, each scored as it comes; dynamic sampling draws until enough have variance.

    `begins` is how many prompts were drawn before the step.
    """

    def __init__(self, source: Source, step: int, begins: int, weights: WeightVersion) -> None:
        self._source, self._begins, self._weights = source, begins, weights
        self.began = time.time()
        """Seconds since the epoch."""
        self.ledger = Ledger(step, 0, weights.version, weights.digest)
        self.full = False
        """Whether all that is drawn is scored, and no more is drawn."""
        self.groups: list[Group] = []
        """Of a full batch those that the update may learn from, in ledger order."""
        self.reference: dict[str, Any] = {}
        """The reference's calls on the samples of `groups`, where there is a reference."""
        self.troubles: dict[str, Any] = {}
        """The scorers' calls for their counters."""
        self._draw(source.stage.prompts_per_step)

    @property
    def generated(self) -> bool:
        """Whether all that is drawn so far is generated."""
        return self.ledger.complete(GroupState.GENERATED)

    @property
    def drawn(self) -> list[Group]:
        """The groups that have come, in ledger order."""
        return self.ledger.batch()

    @property
    def ends(self) -> int | None:
        """How many prompts are drawn when the step has drawn its own; none while that depends on scores to come."""
        known = self.full or not self._source.stage.dynamic_sampling
        return self._begins + self.ledger.size if known else None

    def advance(self) -> None:
        """Once all that was drawn is scored: draw more, or have the batch's samples seen by the reference."""
        if self.full or not self.ledger.complete(GroupState.SCORED):
            return
        stage, roles = self._source.stage, self._source.roles
        wanted, drawn = stage.prompts_per_step, self.drawn
        limit = wanted * (stage.dynamic_sampling.limit if stage.dynamic_sampling else 1)
        if count := further_prompts(wanted, sum(map(has_variance, drawn)), len(drawn), limit):
            self._draw(count)
            return
        self.full, self.groups = True, shaped(chosen(drawn, stage), stage)
        self.troubles = roles.ask_scoring_troubles()
        if stage.has_reference:
            self.reference = roles.ask_reference(every_sample(self.groups))

    def _draw(self, count: int) -> None:
        source, step = self._source, self.ledger.step
        first = self.ledger.extend(count)
        rows = rows_drawn(source.seed, len(source.prompts), self._begins + first, count)
        tasks = [
            Group(step=step, index=first + i, prompt=p.ids, row=p.row, answer=p.answer)
            for i, p in enumerate(source.prompts[row] for row in rows)
        ]
        source.pool.begin(tasks, self.ledger, self._weights, self._score)

    def _score(self, group: Group) -> None:
        self._source.roles.score(group, self.ledger.scored)


class Ahead:
    """The batches under way, oldest first: as many as have their weights and know where their prompts begin."""

    def __init__(self, source: Source, weights: WeightStore) -> None:
        self._source, self._weights = source, weights
        self._batches: deque[Batch] = deque()
        self._step: int | None = None
        """The next to begin; none while nothing is to be made."""
        self._begins: int | None = None
        """How many prompts are drawn before it; none while that is not known."""

    def begin(self, step: int, drawn: int) -> None:
        """Make the batches from a step on, before which so many prompts were drawn; those under way are given up."""
        self.close()
        self._step, self._begins = step, drawn
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
                self._begins = self._batches[-1].ends
            if self._begins is None:
                return
            self._batches.append(Batch(self._source, self._step, self._begins, self._weights.of_step(self._step)))
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

    def trained(self) -> None:
        """The oldest batch is trained on."""
        batch = self._batches.popleft()
        batch.ledger.trained()
        if not self._batches:
            self._begins = batch.ends
