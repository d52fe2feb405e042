"""A run whose controller does harm to it: `python -m benchmarks.saboteur RECIPE STORAGE PLAN`.

PLAN is a JSON list of `{"step", "fault", "role", "phase"}`. Each happens once, at the beginning of its phase; what has
happened is noted in `PLAN.done` before it does, so that a controller that is started again goes on behind it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harm import jot, living, signal_all, spoil, strike, suspended, victim

_MOMENTS = {
    ("rollout", "generate"): "a group is given out",
    ("reward", "score"): "a group is scored",
    ("reference", "score"): "the reference is asked",
    ("critic", "score"): "values",
}
"""When a role begins its work in a phase, where that is not when the loop enters the phase of that name: rollouts,
rewards and the reference begin before the loop waits for them, and the critic's scoring is a phase of its own."""
_FULL_SECONDS = 120.0


def main(recipe: str, storage: str, plan: str) -> None:
    """Begin the run or go on with it, under its supervisor. Exits as `raylign run` does."""
    from raylign.cluster.errors import RaylignError
    from raylign.cluster.supervisor import supervised
    from raylign.trainers.opening import open_run
    from raylign.trainers.recipe import load_recipe

    config = load_recipe(Path(recipe))
    run = open_run(config, Path(storage), named=True, resume=True)
    with run.hold():
        attempt = supervised(run, config.controller, _say)

        from raylign.trainers.launch import launch

        Saboteur(Path(plan), Path(storage)).install()
        try:
            launch(config, run, _say, attempt=attempt)
        except RaylignError as error:
            _say(f"error: {error}")
            raise SystemExit(error.exit_code) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Saboteur:
    """Does what the plan says as the loop enters its phases, or as a role is asked that begins before."""

    def __init__(self, plan: Path, storage: Path) -> None:
        self._plan, self._done_file, self._storage = json.loads(plan.read_text()), Path(f"{plan}.done"), storage
        self._struck_file = Path(f"{plan}.struck")
        self._loop: Any = None
        self._scored = -1
        """The step whose groups are scored now."""

    def install(self) -> None:
        """Be called before all that may be the moment of a cell."""
        from raylign.rollout.pool import RolloutPool
        from raylign.trainers.online.loop import OnlineLoop
        from raylign.trainers.online.phases import Phases
        from raylign.trainers.online.roles import Roles

        _before(OnlineLoop, "run", self._meet)
        _before(RolloutPool, "begin", lambda pool, _, ledger, *__: self._fill_up(pool, ledger.step))
        _before(RolloutPool, "_give", lambda _, work, *__: self._reach("a group is given out", work.ledger.step))
        _before(Roles, "score", self._score)
        _before(Roles, "ask_reference", lambda *_: self._reach("the reference is asked", self._scored))
        _before(Phases, "__call__", lambda _, name, *__, **___: self._enter(name))

    def _meet(self, loop: Any) -> None:
        self._loop = loop

    def _score(self, _: Any, group: Any, __: Any) -> None:
        self._scored = group.step
        self._reach("a group is scored", group.step)

    def _enter(self, phase: str) -> None:
        done = phase == "checkpoint"  # its step has been counted by then
        self._reach(phase, self._loop.step - done)

    def _reach(self, moment: str, step: int) -> None:
        for number, cell in enumerate(self._plan):
            begins = _MOMENTS.get((cell["role"], cell["phase"]), cell["phase"])
            if (cell["step"], begins) == (step, moment) and number not in self._done():
                self._act(number, cell)

    def _done(self) -> set[int]:
        lines = self._done_file.read_text().splitlines() if self._done_file.exists() else []
        return {json.loads(line)["number"] for line in lines}

    def _act(self, number: int, cell: dict[str, Any]) -> None:
        fault, role = cell["fault"], cell["role"]
        actor, pids = (None, [os.getpid()]) if role == "controller" else victim(self._prefix, role)
        jot(self._done_file, number=number, time=time.time(), pids=pids)
        if fault in ("SIGKILL", "SIGSTOP"):
            signal_all(pids, fault)
        elif actor is None:
            strike(fault, self._storage)
        else:
            import ray

            given = (role, cell["phase"], fault, self._storage, self._struck_file, number)
            ray.get(actor.__ray_call__.remote(spoil, *given))

    @property
    def _prefix(self) -> str:
        return f"{self._loop._run.name}/{self._loop._name}"

    def _fill_up(self, pool: Any, step: int) -> None:
        """Before a step with a cell, wait until the one before has healed wholly: each is to find all who should be
        there, and none who is suspended already."""
        ahead = any(cell["step"] == step and n not in self._done() for n, cell in enumerate(self._plan))
        give_up = time.monotonic() + _FULL_SECONDS
        while ahead and time.monotonic() < give_up:
            pool.advance()
            if pool.size >= pool.target and not any(suspended(a["Pid"]) for a in living(self._prefix)):
                return
            time.sleep(0.05)


def _before(owner: type, method: str, act: Callable[..., None]) -> None:
    """Have `act` called, with the same arguments, before each call of a method."""
    whole = getattr(owner, method)

    def wrapped(*given: Any, **named: Any) -> Any:
        act(*given, **named)
        return whole(*given, **named)

    setattr(owner, method, wrapped)


if __name__ == "__main__":
    main(*sys.argv[1:])
