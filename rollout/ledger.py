"""The ledger: which group of a step is pending, running, generated, scored or trained.

It decides nothing and holds no tensors of its own; it makes sure that each group of a step is counted exactly once,
whatever happens to the workers that make it.
"""

from enum import StrEnum

from ..cluster.errors import RunFailed
from .records import Group


class GroupState(StrEnum):
    """A group's way through a step; it only moves forward, except back to pending when its worker is lost."""

    PENDING = "pending"
    RUNNING = "running"
    GENERATED = "generated"
    SCORED = "scored"
    TRAINED = "trained"


class Ledger:
    """The groups of one step, by their place in the batch."""

    def __init__(self, step: int, size: int) -> None:
        self.step = step
        self._state = dict.fromkeys(range(size), GroupState.PENDING)
        self._groups: dict[int, Group] = {}
        self._worker: dict[int, str] = {}
        self.failures = dict.fromkeys(range(size), 0)
        """How often a group itself raised an error."""
        self.losses = dict.fromkeys(range(size), 0)
        """How often a group's worker was lost under it, through no known fault of the group."""

    def pending(self) -> list[int]:
        """Groups that wait for a worker, in order."""
        return [i for i, state in self._state.items() if state is GroupState.PENDING]

    def counts(self) -> dict[str, int]:
        """How many groups are in each state."""
        return {state.value: sum(s is state for s in self._state.values()) for state in GroupState}

    def complete(self, state: GroupState) -> bool:
        """Whether every group has reached a state."""
        order = list(GroupState)
        return all(order.index(s) >= order.index(state) for s in self._state.values())

    def dispatch(self, index: int, worker: str) -> None:
        """A worker took a pending group."""
        self._move(index, GroupState.PENDING, GroupState.RUNNING)
        self._worker[index] = worker

    def failed(self, index: int) -> None:
        """A running group raised an error: it is pending again."""
        self._move(index, GroupState.RUNNING, GroupState.PENDING)
        self.failures[index] += 1

    def lost(self, worker: str) -> list[int]:
        """A worker is gone: its running groups are pending again. Returns them."""
        mine = [i for i, w in self._worker.items() if w == worker and self._state[i] is GroupState.RUNNING]
        for index in mine:
            self._state[index] = GroupState.PENDING
            self.losses[index] += 1
        return mine

    def generated(self, group: Group) -> bool:
        """A group came back. False when it had already come back from elsewhere and this copy is to be ignored."""
        if self._state[group.index] in (GroupState.GENERATED, GroupState.SCORED, GroupState.TRAINED):
            return False
        self._state[group.index] = GroupState.GENERATED
        self._groups[group.index] = group
        return True

    def scored(self, group: Group) -> None:
        """A group has its rewards."""
        self._move(group.index, GroupState.GENERATED, GroupState.SCORED)
        self._groups[group.index] = group

    def trained(self) -> None:
        """The update with all groups of this step is done."""
        for index in self._state:
            self._move(index, GroupState.SCORED, GroupState.TRAINED)

    def batch(self) -> list[Group]:
        """The groups in their order in the step, never in order of arrival."""
        return [self._groups[i] for i in sorted(self._groups)]

    def _move(self, index: int, before: GroupState, after: GroupState) -> None:
        if self._state[index] is not before:
            raise RunFailed(
                f"step {self.step}, group {index}: cannot become {after} from {self._state[index]}: "
                "it would be counted twice"
            )
        self._state[index] = after
