"""The ledger: which group of a step is pending, running, generated, scored or trained, and where it runs.

It decides nothing and holds no tensors of its own; it makes sure that each group of a step is counted exactly once,
whatever happens to the workers that make it, and that none comes from other weights than the step's.
"""

from enum import StrEnum

from ..cluster.errors import RunFailed
from .records import Group


class GroupState(StrEnum):
    """A group's way through a step; it only moves forward, except back to pending when nobody runs it any more."""

    PENDING = "pending"
    RUNNING = "running"
    GENERATED = "generated"
    SCORED = "scored"
    TRAINED = "trained"
    CARRIED = "carried"
    """Done with in this step, and gone on with in the next."""


_ORDER = tuple(GroupState)


class Ledger:
    """The groups of one step, or of what is asked beside it; all of them must come from one weight version."""

    def __init__(self, step: int, size: int, version: int, digest: str, *, title: str = "") -> None:
        self.step, self.version, self.digest = step, version, digest
        self.title = title or f"step {step}"
        """What the groups are for, in messages."""
        self._state: dict[int, GroupState] = {}
        self._counts = dict.fromkeys(GroupState, 0)
        self._groups: dict[int, Group] = {}
        self._carried: dict[int, Group] = {}
        self._runners: dict[int, list[str]] = {}
        """Group → the workers that have a copy of it; no entry where it is not running."""
        self.failures: dict[int, int] = {}
        """How often a group itself raised an error."""
        self.losses: dict[int, int] = {}
        """How often a group's worker was lost under it, through no known fault of the group."""
        self.extend(size)

    def extend(self, count: int) -> int:
        """The step gets so many groups more, pending; returns the place of the first."""
        first = len(self._state)
        for index in range(first, first + count):
            self._state[index] = GroupState.PENDING
            self.failures[index] = self.losses[index] = 0
        self._counts[GroupState.PENDING] += count
        return first

    @property
    def size(self) -> int:
        """How many groups the step has by now."""
        return len(self._state)

    def pending(self) -> list[int]:
        """Groups that wait for a worker, in order."""
        return [i for i, state in self._state.items() if state is GroupState.PENDING]

    def runners(self, index: int) -> tuple[str, ...]:
        """The workers that have a copy of a running group."""
        return tuple(self._runners.get(index, ()))

    def counts(self) -> dict[str, int]:
        """How many groups are in each state."""
        return {state.value: count for state, count in self._counts.items()}

    def complete(self, state: GroupState) -> bool:
        """Whether every group has reached a state."""
        return not any(self._counts[before] for before in _ORDER[: _ORDER.index(state)])

    def dispatch(self, index: int, worker: str) -> None:
        """A worker took a pending group."""
        self._move(index, GroupState.PENDING, GroupState.RUNNING)
        self._runners[index] = [worker]

    def duplicate(self, index: int, worker: str) -> None:
        """Another worker took a copy of a running group; whichever comes first counts."""
        if self._state[index] is not GroupState.RUNNING or worker in self._runners[index]:
            raise RunFailed(f"{self._place(index)} is {self._state[index]} and cannot be given to {worker} as well")
        self._runners[index].append(worker)

    def failed(self, index: int, worker: str) -> bool:
        """A copy raised an error; without another copy the group is pending again. Returns whether it is."""
        self.failures[index] += 1
        return self._leave(index, worker)

    def lost(self, worker: str) -> list[int]:
        """A worker is gone: what it alone was running is pending again. Returns those."""
        mine = [index for index, workers in self._runners.items() if worker in workers]
        for index in mine:
            self.losses[index] += 1
        return [index for index in mine if self._leave(index, worker)]

    def generated(self, group: Group) -> bool:
        """A group came back. False when it had already come back from elsewhere and this copy is to be ignored.

        Raises `RunFailed` for one from another weight version than the step's.
        """
        if (group.version, group.digest) != (self.version, self.digest):
            raise RunFailed(
                f"{self._place(group.index)} came back from weight version {group.version} ({group.digest[:12]}), "
                f"the step is on {self.version} ({self.digest[:12]})"
            )
        if self._state[group.index] not in (GroupState.PENDING, GroupState.RUNNING):
            return False
        self._set(group.index, GroupState.GENERATED)
        self._runners.pop(group.index, None)
        self._groups[group.index] = group
        return True

    def scored(self, group: Group) -> None:
        """A group has its rewards."""
        self._move(group.index, GroupState.GENERATED, GroupState.SCORED)
        self._groups[group.index] = group

    def carried(self, group: Group) -> None:
        """A group that came back is not finished: the next step goes on with it, and this one does without."""
        self._move(group.index, GroupState.GENERATED, GroupState.CARRIED)
        self._carried[group.index] = self._groups.pop(group.index)

    def trained(self) -> None:
        """The update with all groups of this step that are finished is done."""
        for index in self._state.keys() - self._carried.keys():
            self._move(index, GroupState.SCORED, GroupState.TRAINED)

    def batch(self) -> list[Group]:
        """The groups that came back finished, in their order in the step, never in order of arrival."""
        return [self._groups[i] for i in sorted(self._groups)]

    def left(self) -> list[Group]:
        """The groups that the next step goes on with, in their order in this one."""
        return [self._carried[i] for i in sorted(self._carried)]

    def _leave(self, index: int, worker: str) -> bool:
        self._runners[index].remove(worker)
        if self._runners[index]:
            return False
        del self._runners[index]
        self._move(index, GroupState.RUNNING, GroupState.PENDING)
        return True

    def _move(self, index: int, before: GroupState, after: GroupState) -> None:
        if self._state[index] is not before:
            raise RunFailed(
                f"{self._place(index)}: cannot become {after} from {self._state[index]}: it would be counted twice"
            )
        self._set(index, after)

    def _set(self, index: int, state: GroupState) -> None:
        self._counts[self._state[index]] -= 1
        self._counts[state] += 1
        self._state[index] = state

    def _place(self, index: int) -> str:
        return f"{self.title}, group {index}"
