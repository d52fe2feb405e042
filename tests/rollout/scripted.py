"""Rollout actors that do as files tell them, in processes of their own: what a pool makes of workers that misbehave.

Their tokens are a function of seed, step and group, as an engine's are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from raylign.cluster.config import ElasticWorkers, RoleResources
from raylign.cluster.weights import Parcel, WeightVersion
from raylign.rollout.config import RolloutConfig
from raylign.rollout.ledger import GroupState, Ledger
from raylign.rollout.pool import RolloutPool
from raylign.rollout.records import Group
from raylign.rollout.worker import WorkerSpec


def scripted(folder: Path) -> type:
    """An actor class (a local one, so that it travels by value) which looks into `folder`:

    `hold`, `hold-NAME`: groups wait while it is there      `weights-NAME`: so do new weights
    `raise-INDEX`: the group raises what the file names, once; `always-INDEX` each time
    `stale-INDEX`: the group comes back as of another weight version, once
    """

    class Scripted:
        def __init__(self, name: str, spec: WorkerSpec) -> None:
            self._name, self._spec = name.rpartition("/")[2], spec

        def build(self) -> None:
            import os

            draft = folder / f"draft-{os.getpid()}"
            draft.write_text(str(os.getpid()))
            draft.rename(folder / f"pid-{self._name}")

        def set_weights(self, weights: WeightVersion) -> str:
            self._while(f"weights-{self._name}")
            return weights.digest

        def generate(self, group: Group, call: int) -> Group:
            from dataclasses import replace

            import numpy as np
            from raylign.rollout.records import Sample

            self._while("hold", f"hold-{self._name}")
            self._raise(group.index)
            stale = self._once(f"stale-{group.index}")
            tokens = np.array([self._spec.seed, group.step, group.index], np.int32)
            sample = Sample(tokens=tokens, logprobs=np.zeros(3, np.float32), finish_reason="stop")
            return replace(group, samples=(sample,), worker=self._name, version=group.version - stale)

        def abort(self, call: int) -> None:
            pass

        def stay(self, seconds: float) -> None:
            import threading

            threading.Event().wait(seconds)

        def _while(self, *names: str) -> None:
            import time

            while any((folder / name).exists() for name in names):
                time.sleep(0.01)

        def _once(self, name: str) -> bool:
            try:
                (folder / name).unlink()
            except FileNotFoundError:
                return False
            return True

        def _raise(self, index: int) -> None:
            import builtins

            path = folder / f"raise-{index}"
            what = path.read_text() if path.exists() else ""
            if (folder / f"always-{index}").exists() or (what and self._once(path.name)):
                raise getattr(builtins, what or "RuntimeError")("as the script says")

    return Scripted


class Crew:
    """A pool of scripted workers, the notes it made, and the files that tell its workers what to do."""

    def __init__(
        self, folder: Path, name: str, workers: int, *, cpus: float = 0.1, wait_seconds: float = 60, **config: Any
    ) -> None:
        self.folder, self.notes = folder, list[tuple[str, dict[str, Any]]]()
        rollout = RolloutConfig(
            group_size=8,
            slots=16,
            workers=ElasticWorkers(min=1, max=workers + 1, start=workers),
            resources=RoleResources(cpus=cpus),
            **({"health_seconds": 60} | config),
        )
        spec = WorkerSpec(base=folder, dtype="float32", config=rollout, seed=3, max_length=64, stop_token_ids=())
        self.prefix = f"{name}/"
        self.version = 1
        self.pool = RolloutPool(
            prefix=self.prefix,
            spec=spec,
            wait_seconds=wait_seconds,
            note=lambda kind, **fields: self.notes.append((kind, fields)),
            role=scripted(folder),
        )

    def noted(self, kind: str) -> list[dict[str, Any]]:
        return [fields for what, fields in self.notes if what == kind]

    def process(self, worker: str) -> psutil.Process:
        return psutil.Process(int((self.folder / f"pid-{worker}").read_text()))

    def running(self) -> dict[str, int]:
        """How many groups each worker runs."""
        waits = [w.actor.removeprefix(self.prefix) for w in self.pool.waiting() if " group " in w.what]
        return {name: waits.count(name) for name in waits}

    def publish(self) -> None:
        """The next weight version."""
        self.version += 1
        self.pool.set_weights(weights(self.version))

    def until(self, what: str, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Let the pool go on, as between generations, until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"no sign that {what}: {self.notes}"
            self.pool.advance()
            time.sleep(0.02)

    def step(self, step: int, groups: int, tick: Callable[[], None] = lambda: None) -> list[Group]:
        """Generate a step's groups from the newest weights, and check them."""
        return self.end(self.begin(step, groups), tick)

    def begin(self, step: int, groups: int, version: int | None = None) -> "Begun":
        """Have a step's groups generated, from the newest weights or older ones."""
        import numpy as np

        tasks = [Group(step=step, index=i, prompt=np.array([i], np.int32), row={}) for i in range(groups)]
        given = weights(self.version if version is None else version)
        begun = Begun(Ledger(step, groups, given.version, given.digest), [])
        self.pool.begin(tasks, begun.ledger, given, lambda group: begun.came.append(group.index))
        return begun

    def end(self, begun: "Begun", tick: Callable[[], None] = lambda: None) -> list[Group]:
        """Wait for a step, and check that each group was counted once, with the tokens it has everywhere."""
        ledger = begun.ledger
        while not ledger.complete(GroupState.GENERATED):
            self.pool.turn(tick)
        made = ledger.batch()
        assert sorted(begun.came) == list(range(len(made)))
        assert ledger.counts()["generated"] == len(made)
        assert [g.samples[0].tokens.tolist() for g in made] == [[3, ledger.step, i] for i in range(len(made))]
        return made


class Begun(NamedTuple):
    """A step under way, and its groups in the order in which they came."""

    ledger: Ledger
    came: list[int]


def weights(version: int) -> WeightVersion:
    """A version without tensors."""
    return WeightVersion(version, f"digest of {version}", Parcel(()), {}, "base")


@contextmanager
def crew(folder: Path, name: str, workers: int, **config: Any) -> Iterator[Crew]:
    """A crew whose workers work; ends them."""
    made = Crew(folder, name, workers, **config)
    try:
        made.pool.start(weights(made.version), tick=lambda: None)
        yield made
    finally:
        made.pool.close()


def in_turn(acts: Sequence[tuple[Callable[[], bool], Callable[[], Any]]]) -> Callable[[], None]:
    """A tick that waits for each condition and then acts, one after the other."""
    left = list(acts)

    def tick() -> None:
        if left and left[0][0]():
            left.pop(0)[1]()

    return tick
