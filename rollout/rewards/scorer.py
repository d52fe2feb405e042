"""The reward role: scores a group's completions with every reward of the recipe.

Scorer = ray.remote(rollout.scorer.Scorer) makes it an actor; the class itself knows nothing of Ray.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Literal

from ...cluster.errors import RunFailed
from ..config import RewardConfig
from ..records import Group, Sample
from .functions import RewardError, check_names, total
from .process import BoundedReward

OnError = Literal["fail", "drop", "zero"]


class Scorer:
    """Scores groups, each reward in a process of its own and within its time-out.

    A reward that raises, or gives None, NaN or a string, is an error of the data: `fail` stops the run with the reward,
    step, group and completion; `drop` marks the whole group with `error`; `zero` counts the part as 0. All are counted.
    Raises `InputError` for an entry that does not load.
    """

    def __init__(self, rewards: list[RewardConfig], root: Path, on_error: OnError = "fail") -> None:
        check_names(rewards)
        self._on_error = on_error
        self._rewards = [BoundedReward(config, root) for config in rewards]
        self._weights = {r.name: r.weight for r in self._rewards}
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        for reward in self._rewards:
            reward.start()
        try:
            for reward in self._rewards:
                reward.wait_ready()
        except BaseException:
            self.close()
            raise

    def score(self, group: Group) -> Group:
        """The group with each sample's `reward` (weighted sum) and `reward_parts` (unweighted, by name).

        A group that already has an error comes back as it is. Raises `RunFailed` where `on_error` is `fail`.
        """
        if group.error:
            return group
        start = time.perf_counter()
        try:
            samples = tuple(self._score_sample(group, i) for i in range(len(group.samples)))
        except _Dropped as dropped:
            return dataclasses.replace(group, error=str(dropped))
        finally:
            self._seconds += time.perf_counter() - start
        return dataclasses.replace(group, samples=samples)

    def counters(self) -> dict[str, float]:
        """Since the start: `errors/<reward>`, `overruns/<reward>` (those with any), `dropped` groups, `seconds`."""
        overruns = {f"overruns/{r.name}": r.overruns for r in self._rewards if r.overruns}
        return {**{k: float(v) for k, v in sorted((self._counts | overruns).items())}, "seconds": self._seconds}

    def close(self) -> None:
        """End the rewards' processes."""
        for reward in self._rewards:
            reward.close()

    def _score_sample(self, group: Group, index: int) -> Sample:
        sample = group.samples[index]
        parts = {r.name: self._part(r, group, index) for r in self._rewards}
        return dataclasses.replace(sample, reward=total(parts, self._weights), reward_parts=parts)

    def _part(self, reward: BoundedReward, group: Group, index: int) -> float:
        try:
            return reward.score(group.samples[index].text, group.row)
        except RewardError as error:
            self._counts[f"errors/{reward.name}"] += 1
            return self._handle(
                f"reward {reward.name!r} {error}, at step {group.step}, group {group.index}, "
                f"completion {index}: {group.samples[index].text!r:.80}"
            )

    def _handle(self, message: str) -> float:
        if self._on_error == "fail":
            raise RunFailed(f"{message}; mend the reward or the row, or set scoring.on_error to drop or zero")
        if self._on_error == "drop":
            self._counts["dropped"] += 1
            raise _Dropped(message)
        return 0.0


class _Dropped(Exception):
    """Leaves the scoring of a group that is to be dropped."""
