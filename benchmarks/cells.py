"""The kill matrix as a table: what happens to which role in which phase of a step, and what cannot."""

import itertools
from dataclasses import dataclass
from typing import Any

FAULTS = ("SIGKILL", "SIGSTOP", "exception", "out of memory", "disk full")
ROLES = ("rollout", "reward", "reference", "critic", "policy", "controller", "node")
PHASES = ("generate", "score", "update", "publish", "checkpoint")

_AT_WORK = {
    "rollout": ("generate", "publish"),
    "reward": ("score",),
    "reference": ("score",),
    "critic": ("score", "update", "checkpoint"),
    "policy": ("update", "publish", "checkpoint"),
    "controller": PHASES,
    "node": (),
}
"""The phases in which a role has work to do, and so can fail in it."""

_WRITES = {"critic": ("checkpoint",), "policy": ("checkpoint",), "controller": PHASES}
"""The phases in which a role writes to the run's storage."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One fault of one role at the beginning of one phase."""

    fault: str
    role: str
    phase: str

    @property
    def name(self) -> str:
        """`SIGKILL of policy in update`."""
        return f"{self.fault} of {self.role} in {self.phase}"


def all_cells() -> list[Cell]:
    """The whole matrix, in its order."""
    return [Cell(*parts) for parts in itertools.product(FAULTS, ROLES, PHASES)]


def impossible(cell: Cell) -> str:
    """Why a cell cannot happen; empty where it can. A process can be killed or suspended at any time, and a node, which
    is one with a rollout worker, with all of its processes."""
    if cell.role == "node" and cell.fault not in ("SIGKILL", "SIGSTOP"):
        return "of a process"
    if cell.fault in ("exception", "out of memory") and cell.phase not in _AT_WORK[cell.role]:
        return "idle"
    if cell.fault == "disk full" and cell.phase not in _WRITES.get(cell.role, ()):
        return "writes nothing"
    return ""


def matrix(cases: list[dict[str, Any]]) -> str:
    """What came of the cells as a table: seconds from the fault to the end of the next step."""
    told = {Cell(case["fault"], case["role"], case["phase"]): case for case in cases}
    head = f"| fault | role | {' | '.join(PHASES)} |\n|{'---|' * (2 + len(PHASES))}"
    rows = [
        f"| {fault} | {role} | {' | '.join(_entry(Cell(fault, role, phase), told) for phase in PHASES)} |"
        for fault in FAULTS
        for role in ROLES
    ]
    return "\n".join([head, *rows])


def _entry(cell: Cell, told: dict[Cell, dict[str, Any]]) -> str:
    if why := impossible(cell):
        return f"({why})"
    if cell not in told:
        return ""
    case = told[cell]
    ended = "" if case["outcome"] == "healed" else ", resumed"
    return f"{case['seconds']:.0f} s{ended}{'' if case['equal'] else ' **differs**'}"


def overview(cases: list[dict[str, Any]]) -> str:
    """The table by role and fault: the range of the seconds over the phases, in how many of them it can happen."""
    head = f"| | {' | '.join(FAULTS)} |\n|{'---|' * (1 + len(FAULTS))}"
    rows = [f"| {role} | {' | '.join(_range(cases, fault, role) for fault in FAULTS)} |" for role in ROLES]
    return "\n".join([head, *rows])


def _range(cases: list[dict[str, Any]], fault: str, role: str) -> str:
    told = [case for case in cases if (case["fault"], case["role"]) == (fault, role)]
    if not told:
        possible = any(not impossible(Cell(fault, role, phase)) for phase in PHASES)
        return "not measured" if possible else "cannot"
    low, high = (f"{bound(case['seconds'] for case in told):.0f}" for bound in (min, max))
    ended = sum(case["outcome"] != "healed" for case in told)
    unlike = sum(not case["equal"] for case in told)
    notes = f"{len(told)}" + (f", {ended} resumed" if ended else "") + (f", {unlike} **differ**" if unlike else "")
    return f"{low if low == high else f'{low}–{high}'} s ({notes})"
