"""What a death costs: seconds from a SIGKILL to the end of the next step by role, and goodput against the formula.

Goodput is the share of the time that goes into steps that stay. Where the policy dies every M seconds, a checkpoint
takes δ seconds every τ seconds, and R seconds pass from a death until the policy is back at its last checkpoint, the
formula leaves 1 − δ/τ − (τ/2 + R)/M. All of these are measured in the run that is compared with it.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .arena import Arena
from .cells import Cell
from .harness import all_cores
from .measured import Case, Contest, Measured
from .trouble import every_other_step, suffer, write_recipe

PHASE = {
    "rollout": "generate",
    "reward": "score",
    "reference": "score",
    "critic": "update",
    "policy": "update",
    "controller": "update",
}
"""At the beginning of which phase a role is killed: one in which the step waits for it."""

_EVERY = 10
"""Steps between two checkpoints of the goodput run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Of a run whose policy was killed `kills` times, in seconds as in the formula; `wall` from first step to last."""

    kills: int
    wall: float
    useful: float
    delta: float
    tau: float
    recovery: float
    between: float

    @property
    def formula(self) -> float:
        """The goodput to expect, to first order."""
        return 1 - self.delta / self.tau - (self.tau / 2 + self.recovery) / self.between


def cases() -> list[Case]:
    """One a role, and goodput."""
    return [*(_role_case(role, tuple(PHASE)) for role in PHASE), _goodput_case(steps=120, kills=4)]


def quick_cases() -> list[Case]:
    """A scorer's death."""
    return [_role_case("reward", ("reward",))]


def _role_case(role: str, killed: Sequence[str]) -> Case:
    return Case(
        name=f"{role}-killed",
        peer="an undisturbed step",
        unit="steps per second",
        group="recovery",
        make=partial(_of_role, role, killed),
    )


def _goodput_case(steps: int, kills: int) -> Case:
    return Case(
        name=f"goodput-policy-killed-{kills}-times",
        peer="1 − δ/τ − (τ/2 + R)/M",
        unit="of the time",
        group="recovery",
        make=partial(_of_goodput, steps, kills),
    )


def _of_role(role: str, killed: Sequence[str], arena: Arena) -> Contest:
    trial = partial(arena.get, _killed_by_role, arena, tuple(killed))
    return Contest(
        ours=lambda pair: _one(trial(pair)[0][role]),
        theirs=lambda pair: _one(trial(pair)[1]),
        warm_up=lambda: None,
        settings={"phase": PHASE[role]},
    )


def _of_goodput(steps: int, kills: int, arena: Arena) -> Contest:
    trial = partial(arena.get, _killed_policy, arena, steps, kills)
    measured: list[dict[str, Any]] = []

    def ours(pair: int) -> Measured:
        found: Goodput = trial(pair)
        measured.append({**asdict(found), "formula": found.formula})
        return Measured(amount=found.useful, seconds=found.wall, cpu_seconds=found.wall)

    def theirs(pair: int) -> Measured:
        found: Goodput = trial(pair)
        return Measured(amount=found.formula * found.wall, seconds=found.wall, cpu_seconds=found.wall)

    settings = {"steps": steps, "steps_between_checkpoints": _EVERY, "measured": measured}
    return Contest(ours=ours, theirs=theirs, warm_up=lambda: None, settings=settings)


def _one(seconds: float) -> Measured:
    return Measured(amount=1, seconds=seconds, cpu_seconds=seconds)


def _killed_by_role(arena: Arena, roles: Sequence[str], pair: int) -> tuple[dict[str, float], float]:
    """A run in which each role dies once: seconds to the end of the next step by role, and of an undisturbed step."""
    cells = every_other_step([Cell("SIGKILL", role, PHASE[role]) for role in roles])
    told, run = _suffered(arena, f"roles-{pair}", cells, 2 * len(roles) + 2)
    return {t["role"]: t["seconds"] for t in told}, step_seconds(run.all_metrics())


def _killed_policy(arena: Arena, steps: int, kills: int, pair: int) -> Goodput:
    """A run whose policy dies in so many steps drawn by lot."""
    drawn = sorted(random.Random(pair).sample(range(1, steps - 1), kills))
    cells = {step: Cell("SIGKILL", "policy", "update") for step in drawn}
    alone = ("type=grpo", "critic=null", "kl=null", "policy.ranks=1", "rollout.workers=1", f"checkpoint_every={_EVERY}")
    told, run = _suffered(arena, f"goodput-{pair}", cells, steps, *(f"stages.0.{key}" for key in alone))
    return goodput(run.all_metrics(), run.events("checkpoint"), run.events("resumed"), [t["time"] for t in told])


def _suffered(arena: Arena, name: str, cells: dict[int, Cell], steps: int, *sets: str) -> tuple[list[Any], Any]:
    from raylign.cluster.processes import adopt_orphans
    from raylign.cluster.rundir import RunDir

    from .models import tiny_model

    adopt_orphans()
    recipe = write_recipe(arena.root / name, arena.get(tiny_model, arena.root / "tiny"), steps, *sets)
    storage = Path(recipe.parent / "runs")
    with all_cores():  # a run is many processes
        return suffer(recipe, storage, cells), RunDir(storage / "chaos")


def step_seconds(metrics: Sequence[dict[str, Any]]) -> float:
    """What a step takes: the median of the sums of its phases."""
    return statistics.median(sum(v for key, v in m.items() if key.startswith("seconds/")) for m in metrics)


def goodput(
    metrics: Sequence[dict[str, Any]],
    checkpoints: Sequence[dict[str, Any]],
    resumed: Sequence[dict[str, Any]],
    killed: Sequence[float],
) -> Goodput:
    """From a run's records and the times of the kills.

    The steps between two checkpoints are timed as they follow each other undisturbed, so that what the controller does
    between its phases counts as theirs.
    """
    ended = {m["step"]: m["time"] for m in metrics}
    between = [ended[n + 1] - ended[n] for n in ended if n + 1 in ended and (n + 1) % _EVERY]
    step = statistics.median(between)
    deltas = [c["time"] - ended[c["step"] - 1] for c in checkpoints]
    delta = statistics.median(d for d in deltas if d > 0)  # of a step that was made again, the first is gone
    back = [min(r["time"] for r in resumed if r["time"] > moment) - moment for moment in killed]
    wall = max(ended.values()) - min(ended.values())
    return Goodput(
        kills=len(killed),
        wall=wall,
        useful=step * (len(ended) - 1),
        delta=delta,
        tau=_EVERY * step + delta,
        recovery=statistics.mean(back),
        between=wall / len(killed),
    )
