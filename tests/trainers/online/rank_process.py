"""Ranks in processes of their own, without Ray: `Group` starts them once and gives all the same job.

A job is a function of this file. Its first argument is the rank's seat; without one it is the only rank, in the test's
own process.
"""

import faulthandler
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from raylign.cluster.process_group import Seat, open_store
from raylign.cluster.weights import joined, version_digest
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.critic import Critic
from raylign.trainers.online.policy import Policy, PolicySpec
from raylign.trainers.online.ranks import whole
from raylign.trainers.stages import OnlineStage

LENGTHS = [(5, 4), (2, 7), (9, 1), (3, 3)]
"""Tokens of prompt and completion of each sample."""


class Group:
    """So many processes; each job is done by all of them, as a process group of its own."""

    def __init__(self, size: int) -> None:
        self._store, self._numbers = open_store("127.0.0.1"), itertools.count()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for _ in range(size):
            ours, theirs = Pipe()
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
            self._pipes.append(ours)
            theirs.close()  # so that the death of the process ends what is waited for from it

    def do(self, job: Callable[..., Any], **given: Any) -> list[Any]:
        """What each rank's job returned, or the error it raised."""
        name = f"job {next(self._numbers)}"
        for rank, pipe in enumerate(self._pipes):
            seat = Seat(
                rank=rank,
                size=len(self._pipes),
                host=self._store.host,
                port=self._store.port,
                name=name,
                meet_seconds=60,
                timeout=60,
            )
            pipe.send((job.__name__, seat, given))
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            pipe.close()
            process.wait(timeout=30)


def serve(pipe: Connection) -> None:
    """Do jobs until the pipe closes."""
    import torch.distributed as dist

    faulthandler.enable()  # a process that crashes says where
    while True:
        try:
            name, seat, given = pipe.recv()
        except EOFError:
            return
        try:
            answer = globals()[name](seat, **given)
        except Exception as error:  # noqa: BLE001  the test's to judge
            answer = error.with_traceback(None)  # which would keep the job's model
        pipe.send(answer)
        gc.collect()  # what a job made goes before its process group does
        if dist.is_initialized():
            dist.destroy_process_group()


def samples(lengths: list[tuple[int, int]] = LENGTHS) -> list[TrainSample]:
    """Random ones, with all that policy and critic need."""
    random = np.random.default_rng(0)
    words = random.integers(3, 250, 10).astype(np.int32)  # of which all prompts are a part: the samples share rows
    return [
        TrainSample(
            prompt=words[:prompt],
            tokens=random.integers(3, 250, completion).astype(np.int32),
            behaviour=-random.random(completion).astype(np.float32) * 6,
            advantages=np.full(completion, random.normal(), np.float32),
            reference=-random.random(completion).astype(np.float32) * 6,
            values=np.zeros(completion, np.float32),
            returns=random.normal(1, 1, completion).astype(np.float32),
        )
        for prompt, completion in lengths
    ]


def spec(base: Path, dtype: str = "float32", **options: Any) -> PolicySpec:
    """A policy's, with the stage's options."""
    given = {
        "adapter": {"r": 4},
        "data": {"path": "none"},
        "rewards": [{"type": "format", "pattern": "x"}],
        "kl": {"coefficient": 0.1},
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    stage = OnlineStage.model_validate(given | options)
    return PolicySpec(base=base, base_digest="", adapter=None, stage=stage, seed=1, dtype=dtype)


def train(
    seat: Seat | None,
    spec: PolicySpec,
    updates: list[list[TrainSample]],
    load: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """A policy's updates, one a step: the last one's gradient as it was before clipping, metrics and weights after."""
    policy = Policy(spec, seat)
    if load:
        policy.load(load)
    told = [policy.update(given, step, 0.1) for step, given in enumerate(updates)]
    if save:
        policy.save(save)
    weights, config = policy.export()
    if save:
        policy.written(wait=True)  # another job reads it, and its thread ends with this one
    return {
        "metrics": told,
        "gradient": _gradient(policy._learner, [m["grad_norm"] for m in told if "grad_norm" in m], spec.stage),
        "weights": {name: array.copy() for name, array in weights.items()},
        "digest": version_digest(joined(weights), config, "") if policy.leads else None,
    }


def learn_values(seat: Seat | None, spec: PolicySpec, updates: list[list[TrainSample]]) -> dict[str, Any]:
    """A critic's updates: the last one's gradient, metrics, and values after."""
    critic = Critic(spec, seat)
    told = [critic.update(given, step) for step, given in enumerate(updates)]
    return {
        "metrics": told,
        "gradient": _gradient(critic._learner, [m["value/grad_norm"] for m in told], spec.stage),
        "values": critic.values(updates[0]),
    }


def _gradient(learner: Any, norms: list[float], stage: OnlineStage) -> dict[str, np.ndarray]:
    clipped = min(1.0, stage.max_grad_norm / (norms[-1] + 1e-6)) if norms else 1.0
    held = {name: whole(p.grad) for name, p in learner._trained.items() if p.grad is not None}
    return {name: gradient.numpy() / clipped for name, gradient in held.items()}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
