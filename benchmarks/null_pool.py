"""A rollout pool whose engines compute nothing: real Ray actors in processes of their own, so that only the pool's own
work and its faults are measured."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from raylign.cluster.config import ElasticWorkers, RoleResources
from raylign.cluster.weights import Parcel, WeightVersion
from raylign.rollout.config import RolloutConfig
from raylign.rollout.ledger import GroupState, Ledger
from raylign.rollout.pool import RolloutPool
from raylign.rollout.records import Group
from raylign.rollout.worker import WorkerSpec

GROUP = 8
_TOKENS = 64


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this process alone; null workers reserve next to nothing.

    This process has the last core, the others the rest: what workers take is not the controller's, as on a cluster.
    """
    import ray
    from raylign.cluster.session import loopback_host

    before, cores = os.sched_getaffinity(0), list(range(os.cpu_count() or 1))
    os.sched_setaffinity(0, cores[:-1] or cores)
    here = {"_node_ip_address": host} if (host := loopback_host()) else {}
    ray.init(address="local", num_cpus=2, include_dashboard=False, namespace="raylign", log_to_driver=False, **here)
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # one that has ended since
            os.sched_setaffinity(thread.id, cores[-1:])
    try:
        yield
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, before)


def null_role(folder: Path, seconds: float, *, steady: bool = False) -> type:
    """An actor class (local, so that it travels by value) that sleeps for a group's time and returns empty samples.

    A group's time is `seconds`, or on average and up to three times as long, by its index alone.
    """

    class Null:
        def __init__(self, name: str, spec: WorkerSpec) -> None:
            self._name = name

        def build(self) -> None:
            import os

            (folder / self._name.rpartition("/")[2]).write_text(str(os.getpid()))

        def set_weights(self, weights: WeightVersion) -> str:
            return weights.digest

        def generate(self, group: Group, call: int) -> Group:
            import time
            from dataclasses import replace

            import numpy as np
            from raylign.rollout.records import Sample

            if seconds:
                longer = 1 if steady else 0.5 + 2.5 * ((group.index * 7919) % 100 / 100) ** 4
                time.sleep(seconds * longer)
            tokens, logprobs = np.zeros(_TOKENS, np.int32), np.zeros(_TOKENS, np.float32)
            sample = Sample(tokens=tokens, logprobs=logprobs, finish_reason="length")
            return replace(group, samples=(sample,) * GROUP, worker=self._name)

        def abort(self, call: int) -> None:
            pass

        def stay(self, seconds: float) -> None:
            import threading

            threading.Event().wait(seconds)

    return Null


def null_spec(folder: Path, *, workers: int, capacity: int) -> WorkerSpec:
    """What null workers are built from; each has `capacity` groups at once."""
    config = RolloutConfig(
        group_size=GROUP,
        slots=GROUP * capacity,
        workers=ElasticWorkers(min=1, max=workers, start=workers),
        resources=RoleResources(cpus=0),
    )
    return WorkerSpec(base=folder, dtype="float32", config=config, seed=0, max_length=64, stop_token_ids=())


class NullPool:
    """A pool of null workers, its notes with their times, and its steps."""

    def __init__(self, folder: Path, name: str, workers: int, *, capacity: int, seconds: float) -> None:
        self.folder, self.name = folder, name
        self.notes: list[tuple[float, str, dict[str, Any]]] = []
        self.pool = RolloutPool(
            prefix=f"{name}/",
            spec=null_spec(folder, workers=workers, capacity=capacity),
            wait_seconds=300,
            note=lambda kind, **fields: self.notes.append((time.monotonic(), kind, fields)),
            role=null_role(folder, seconds),
        )
        self.step = 0

    def give(self, at_once: int) -> None:
        """Have each worker get so many groups at once, not more than `capacity`: without starting others for it."""
        self.pool._fleet.capacity = at_once

    def generate(self, groups: int, tick: Any = lambda: None) -> None:
        """One step, from the weights published for it to the last group."""
        weights = _weights(self.step)
        self.pool.set_weights(weights)
        ledger = Ledger(self.step, groups, weights.version, weights.digest)
        self.pool.begin(tasks(groups, self.step), ledger, weights, lambda group: None)
        while not ledger.complete(GroupState.GENERATED):
            self.pool.turn(tick)
        self.step += 1

    def names(self) -> list[str]:
        """The actors that work, by the notes."""
        here: dict[str, None] = {}
        for _, kind, fields in self.notes:
            if kind == "worker_joined":
                here[fields["worker"]] = None
            elif kind in ("worker_lost", "worker_left"):
                here.pop(fields["worker"], None)
        return list(here)

    def kill(self, name: str) -> None:
        """SIGKILL a worker's process."""
        psutil.Process(int((self.folder / name.rpartition("/")[2]).read_text())).kill()


def tasks(groups: int, step: int) -> list[Group]:
    """The groups of a step; prompts of 32 tokens."""
    return [Group(step=step, index=i, prompt=np.full(32, i, np.int32), row={"prompt": str(i)}) for i in range(groups)]


def _weights(version: int) -> WeightVersion:
    return WeightVersion(version, f"digest of {version}", Parcel(()), {}, "base")


@contextmanager
def null_pool(workers: int, *, capacity: int = 8, seconds: float = 0.0) -> Iterator[NullPool]:
    """A pool whose workers work; ends them."""
    with TemporaryDirectory(prefix="raylign-null-") as folder:
        made = NullPool(Path(folder), f"null-{os.getpid()}-{workers}", workers, capacity=capacity, seconds=seconds)
        try:
            made.pool.start(_weights(0), tick=lambda: None)
            yield made
        finally:
            made.pool.close()
