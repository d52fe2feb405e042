"""Held-out prompts that the policy answers while it learns, through the rollout workers and scorers of its stage.

The answers to a prompt are drawn with the same random numbers each time, so that two measurements differ by the weights
alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from ...cluster.weights import WeightVersion
from ...rollout.ledger import GroupState, Ledger
from ...rollout.pool import RolloutPool
from ...rollout.records import Draw, Group, Origin
from ...rollout.rewards.functions import ENVIRONMENT, reward_name
from ..stages import OnlineStage
from .ahead import Prompt
from .roles import Roles

_STEP = 2**31 - 1
"""What random numbers of held-out answers come from in place of a step."""


class HeldOut:
    """The held-out prompts of a stage, and when they are asked."""

    def __init__(self, stage: OnlineStage, prompts: Sequence[Prompt], pool: RolloutPool, roles: Roles) -> None:
        self._stage, self._prompts, self._pool, self._roles = stage, prompts, pool, roles

    def due(self, step: int) -> bool:
        """Whether they are to be asked after so many steps."""
        asked = self._stage.held_out
        return asked is not None and (step % asked.every == 0 or step == self._stage.steps)

    def ask(self, step: int, weights: WeightVersion) -> "Asked":
        """Have all of them answered from these weights, those of the policy after so many steps."""
        asked = self._stage.held_out
        assert asked is not None
        title = f"held-out prompts after step {step}"
        ledger = Ledger(step, len(self._prompts), weights.version, weights.digest, title=title)
        draw = Draw(asked.samples, asked.temperature)
        groups = [
            replace(prompt.group(Origin(_STEP, i, i)), step=step, draw=draw) for i, prompt in enumerate(self._prompts)
        ]
        self._pool.begin(groups, ledger, weights, lambda group: self._roles.score(group, ledger.scored))
        return Asked(self._stage, ledger)


class Asked:
    """The held-out prompts on their way through workers and scorers."""

    def __init__(self, stage: OnlineStage, ledger: Ledger) -> None:
        self._stage, self._ledger = stage, ledger

    @property
    def answered(self) -> bool:
        """Whether every answer has its rewards."""
        return self._ledger.complete(GroupState.SCORED)

    @property
    def groups(self) -> list[Group]:
        """The prompts with their answers, in their order."""
        return self._ledger.batch()

    def metrics(self) -> dict[str, float]:
        """What the answers are worth, each name with `held_out/` before it."""
        assert self._stage.held_out is not None
        names = [reward_name(reward) for reward in self._stage.rewards] or [ENVIRONMENT]
        right = self._stage.held_out.right or names[0]
        return {f"held_out/{name}": value for name, value in answer_metrics(self.groups, right).items()}


def answer_metrics(groups: Sequence[Group], right: str) -> dict[str, float]:
    """What answers are worth: means of `reward` and `reward/<part>`, `accuracy` (the share whose part `right` is 1),
    `pass@k` for 2, 4, … and all of several answers to a prompt, mean `length` in tokens.

    `errors` counts prompts that could not be scored; their answers are worth nothing.
    """
    samples = [sample for group in groups for sample in group.samples]
    sound = [sample for group in groups if not group.error for sample in group.samples]
    worth = {"reward": math.fsum(s.reward or 0.0 for s in sound) / len(samples)}
    for part in sound[0].reward_parts if sound else ():
        worth[f"reward/{part}"] = math.fsum(s.reward_parts[part] for s in sound) / len(samples)
    correct = [0 if group.error else sum(s.reward_parts[right] >= 1 for s in group.samples) for group in groups]
    worth["accuracy"] = sum(correct) / len(samples)
    drawn = len(groups[0].samples)
    for k in sorted({drawn, *(2**i for i in range(1, drawn.bit_length()))} - {1}):
        worth[f"pass@{k}"] = math.fsum(pass_at(k, drawn, c) for c in correct) / len(groups)
    worth["length"] = sum(s.drawn for s in samples) / len(samples)
    return worth | {"errors": float(sum(group.error is not None for group in groups))}


def pass_at(k: int, drawn: int, correct: int) -> float:
    """The chance that one of k answers is right, unbiased from those drawn (Chen et al. 2021, 2107.03374)."""
    return 1 - math.comb(drawn - correct, k) / math.comb(drawn, k)
