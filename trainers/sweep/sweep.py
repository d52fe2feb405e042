"""A sweep from its recipe to its table: connect, search, draw, and write `sweep.json`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cluster.placement import offers
from ...cluster.rundir import write_atomically
from ...cluster.session import connect
from ..config import RunConfig
from .plots import draw
from .search import Goal, at_once, search
from .space import Param
from .trial import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is tried and how much of it."""

    params: Sequence[Param]
    goal: Goal
    trials: int
    concurrent: int | None
    """At once; None for as many as fit."""
    grace: int | None
    """Steps that every trial has; None for an eighth of them."""

    @property
    def all(self) -> int:
        """How many trials there will be: a grid is tried whole each time."""
        return self.trials * math.prod(len(p.values) for p in self.params if p.kind == "grid")


def run_sweep(
    config: RunConfig, recipe: Path, overrides: Sequence[str], folder: Path, wishes: Wishes, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the trials in `folder` on the recipe's cluster, or on a local Ray; gives what is known of each, best first.

    Raises `DoesNotFit` where not even one has room.
    """
    with connect(config.cluster, dashboard=False) as session:
        fit = at_once(config, offers(), wishes.concurrent or wishes.all)
        say(f"{folder.name}: {wishes.all} trials, {fit} at once, in {folder}")
        job = Job(
            recipe=str(recipe.resolve()),
            storage=str(folder),
            overrides=tuple(overrides),
            address=session.address,
            stage=wishes.goal.stage,
            metric=wishes.goal.metric,
        )
        found = search(
            job,
            wishes.params,
            wishes.goal,
            trials=wishes.trials,
            concurrent=fit,
            grace=wishes.grace,
            seed=config.seed,
        )
    told = [{key: value for key, value in asdict(outcome).items() if key != "curve"} for outcome in found]
    best = told[0]["run"] if told and told[0]["best"] is not None else None
    facts = {"sweep": folder.name, "metric": wishes.goal.metric, "mode": wishes.goal.mode, "best": best, "trials": told}
    write_atomically(folder / "sweep.json", json.dumps(facts, indent=1))
    plots = draw(found, wishes.params, wishes.goal, folder / "plots")
    return facts | {"storage": str(folder), "plots": [str(path) for path in plots]}
