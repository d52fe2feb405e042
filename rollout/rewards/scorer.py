"""The reward role: scores a group's completions with every reward of the recipe.

`ray.remote(Scorer)` makes it an actor; the class itself knows nothing of Ray.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from ...cluster.errors import RunFailed
from ...cluster.imports import importing
from ..config import ModelReward, RewardConfig
from ..records import Group, Sample
from .functions import ENVIRONMENT, RewardError, check_names, reward_name, total
from .process import BoundedReward

OnError = Literal["fail", "drop", "zero"]


class GroupReward(Protocol):
    """Scores the samples of a group; `overruns` counts those it had no time for."""

    overruns: int

    def wait_ready(self) -> None:
        """Wait until it is loaded. Raises `InputError` for an entry that does not load."""
        ...

    def outcomes(self, group: Group) -> Iterator[float | RewardError]:
        """The unweighted score of each sample, or what was wrong with it, in order."""
        ...

    def close(self) -> None:
        """End what belongs to it."""
        ...


class Scorer:
    """Scores groups: rewards of text each in a process of its own and within its time-out, reward models on `device`.

    A reward that raises, or gives None, NaN or a string, is an error of the data: `fail` stops the run with the reward,
    step, group and completion; `drop` marks the whole group with `error`; `zero` counts the part as 0. All are counted.
    Raises `InputError` for an entry that does not load.
    """

    def __init__(
        self, rewards: list[RewardConfig], root: Path, on_error: OnError = "fail", device: str = "cpu"
    ) -> None:
        check_names(rewards)
        self._on_error = on_error
        self._weights = {reward_name(config): config.weight for config in rewards} | {ENVIRONMENT: 1.0}
        self._rewards: dict[str, GroupReward] = {}
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        try:
            # Processes first: they load while this one does.
            for config in sorted(rewards, key=lambda config: isinstance(config, ModelReward)):
                self._rewards[reward_name(config)] = _begin(config, root, device)
            for reward in self._rewards.values():
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
            samples = tuple(self._scored(group))
        except _Dropped as dropped:
            return dataclasses.replace(group, error=str(dropped))
        finally:
            self._seconds += time.perf_counter() - start
        return dataclasses.replace(group, samples=samples)

    def counters(self) -> dict[str, float]:
        """Since the start: `errors/<reward>`, `overruns/<reward>` (those with any), `dropped` groups, `seconds`."""
        overruns = {f"overruns/{name}": r.overruns for name, r in self._rewards.items() if r.overruns}
        return {**{k: float(v) for k, v in sorted((self._counts | overruns).items())}, "seconds": self._seconds}

    def close(self) -> None:
        """End the rewards' processes."""
        for reward in self._rewards.values():
            reward.close()

    def _scored(self, group: Group) -> Iterator[Sample]:
        columns = {name: reward.outcomes(group) for name, reward in self._rewards.items()}
        for index, sample in enumerate(group.samples):
            parts = {name: self._part(name, next(column), group, index) for name, column in columns.items()}
            if sample.environment is not None:
                given = RewardError(sample.trouble) if sample.trouble else sample.environment
                parts[ENVIRONMENT] = self._part(ENVIRONMENT, given, group, index)
            yield dataclasses.replace(sample, reward=total(parts, self._weights), reward_parts=parts)

    def _part(self, name: str, outcome: float | RewardError, group: Group, index: int) -> float:
        if not isinstance(outcome, RewardError):
            return outcome
        self._counts[f"errors/{name}"] += 1
        return self._handle(
            f"reward {name!r} {outcome}, at step {group.step}, group {group.index}, "
            f"completion {index}: {group.samples[index].text!r:.80}"
        )

    def _handle(self, message: str) -> float:
        if self._on_error == "fail":
            raise RunFailed(f"{message}; mend the reward or the row, or set scoring.on_error to drop or zero")
        if self._on_error == "drop":
            self._counts["dropped"] += 1
            raise _Dropped(message)
        return 0.0


def _begin(config: RewardConfig, root: Path, device: str) -> GroupReward:
    """A reward on its way; paths are relative to `root`."""
    if not isinstance(config, ModelReward):
        reward = BoundedReward(config, root)
        reward.start()
        return reward
    assert config.path is not None, "the pipeline puts the folder where a recipe has a stage"
    with importing():
        from .model import RewardModel

    return RewardModel(root / config.path, device)


class _Dropped(Exception):
    """Leaves the scoring of a group that is to be dropped."""
