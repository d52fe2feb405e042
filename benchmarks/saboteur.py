"""A run whose controller does harm to it: `python -m benchmarks.saboteur RECIPE STORAGE PLAN`.

PLAN is a JSON list of `{"step", "fault", "role", "phase"}`. Each happens once, at the beginning of its phase; what has
happened is noted in `PLAN.done` before it does, so that a controller that is started again goes on behind it.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

_METHODS = {
    ("rollout", "generate"): ("_worker", "generate"),
    ("rollout", "publish"): ("_worker", "set_weights"),
    ("reward", "score"): ("", "_scored"),
    ("reference", "score"): ("_reference", "logprobs"),
    ("critic", "score"): ("_critic", "values"),
    ("critic", "update"): ("_critic", "update"),
    ("critic", "checkpoint"): ("_critic", "save"),
    ("policy", "update"): ("_policy", "update"),
    ("policy", "publish"): ("_policy", "export"),
    ("policy", "checkpoint"): ("_policy", "save"),
}
"""Where an actor's own code can be made to raise: the attribute that has it, and the method."""
_SCORES = {"reference": "reference", "critic": "values"}
"""What the loop calls the part of scoring that is not the rewards."""
_HEADROOM = 256 * 2**20
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
    """Does what the plan says as the loop enters its phases."""

    def __init__(self, plan: Path, storage: Path) -> None:
        self._plan, self._done_file, self._storage = json.loads(plan.read_text()), Path(f"{plan}.done"), storage

    def install(self) -> None:
        """Be called at the beginning of every phase of every step."""
        from raylign.trainers.online import loop

        enter = loop._Phase.__enter__

        def entered(phase: Any) -> None:
            enter(phase)
            self._reach(phase._loop, phase._name)

        loop._Phase.__enter__ = entered  # pyright: ignore[reportAttributeAccessIssue]

    def _reach(self, loop: Any, phase: str) -> None:
        step = loop.step - 1 if phase == "checkpoint" else loop.step  # it has been counted by then
        for number, cell in enumerate(self._plan):
            name = _SCORES.get(cell["role"], "score") if cell["phase"] == "score" else cell["phase"]
            if cell["step"] == step and phase == "generate":
                _fill_up(loop._pool)
            if (cell["step"], name) == (step, phase) and number not in self._done():
                self._act(number, cell, f"{loop._run.name}/{loop._name}")

    def _done(self) -> set[int]:
        lines = self._done_file.read_text().splitlines() if self._done_file.exists() else []
        return {json.loads(line)["number"] for line in lines}

    def _act(self, number: int, cell: dict[str, Any], prefix: str) -> None:
        fault, role = cell["fault"], cell["role"]
        actor, pids = (None, [os.getpid()]) if role == "controller" else _victim(prefix, role)
        with self._done_file.open("a") as file:
            file.write(json.dumps({"number": number, "time": time.time(), "pids": pids}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if fault in ("SIGKILL", "SIGSTOP"):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # a raylet's workers end with it
                    os.kill(pid, signal.Signals[fault])
        elif fault == "disk full":
            fill(self._storage)
        elif actor is None:
            _raise(fault)
        else:
            import ray

            ray.get(actor.__ray_call__.remote(_spoil, *_METHODS[role, cell["phase"]], fault))


def _fill_up(pool: Any) -> None:
    """Wait until the cell before has healed wholly, so that no cell finds fewer workers than there should be."""
    give_up = time.monotonic() + _FULL_SECONDS
    while pool.size < pool.target and time.monotonic() < give_up:
        pool.advance()
        time.sleep(0.05)


def _victim(prefix: str, role: str) -> tuple[Any, list[int]]:
    """A living actor of a role, and its process; of a node, a rollout worker away from the head, and its raylet with
    all that descends from it."""
    import ray
    from ray._private.state import actors

    head = ray.util.get_node_ip_address()
    kind = "rollout" if role == "node" else role
    alive = [a for a in actors(actor_state_name="ALIVE").values() if a["Name"].startswith(f"{prefix}/{kind}")]
    if role == "node":
        alive = [a for a in alive if a["Address"]["IPAddress"] != head]
        return None, processes_of_node(alive[0]["Address"]["IPAddress"])
    return ray.get_actor(alive[0]["Name"]), [alive[0]["Pid"]]


def processes_of_node(address: str) -> list[int]:
    """The raylet of the node with that address on this machine, before all that descends from it."""
    import psutil

    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and f"--node_ip_address={address}" in (process.info["cmdline"] or ()):
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
    raise RuntimeError(f"no raylet has the address {address}")


def _spoil(actor: Any, owner: str, method: str, fault: str) -> None:
    """Have a method raise the next time it is called."""
    target = getattr(actor, owner) if owner else actor
    whole = getattr(target, method)

    def once(*_: Any, **__: Any) -> None:
        setattr(target, method, whole)
        _raise(fault)

    setattr(target, method, once)


def _raise(fault: str) -> None:
    if fault == "exception":
        raise RuntimeError("an exception that nobody foresaw")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _HEADROOM, hard))
    try:
        bytearray(2 * _HEADROOM)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fill(storage: Path) -> None:
    """Leave no byte on a storage's file system."""
    with (storage / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
