"""New weights from the policy to the last worker: an adapter against all weights, and all weights against plain Ray.

A round is what a training step does: the policy exports, digests and puts the weights, every worker receives them,
proves their digest, has its engine load them and answers. `limit` is the time that one copy of the bytes takes at this
machine's memory bandwidth plus one call of a Ray actor, both measured before every pair. Plain Ray is a state dict of
torch tensors put and got as it is, loaded without any proof. These cases use all cores: policy and workers are
processes of their own.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from raylign.cluster.weights import WeightVersion
from raylign.rollout.config import RolloutConfig
from raylign.rollout.worker import RolloutActor, WorkerSpec
from raylign.trainers.online.policy import PolicyActor, PolicySpec
from raylign.trainers.stages import OnlineStage

from .arena import Arena
from .harness import all_cores
from .measured import Case, Contest, Measured

_ROUNDS = {"adapter": 5, "full": 5, "plain": 1}
"""In a repetition: ten pairs are fifty rounds of what is ours."""
_WORKERS = (1, 2, 4)
_WARM_UP_SECONDS = 3.0
"""Ray gives a version's memory back within a second. After that new versions come into memory that was used before, as
they do in a long run; fresh pages are zeroed first, which takes longer than the copy."""
_COPY_BYTES = 256 << 20
_SECONDS = 300

Round = Callable[[], tuple[float, float]]
"""Brings new weights to all workers; seconds until the policy had published, and until the last worker had them."""


class Policy(PolicyActor):
    """A policy whose weights change without training."""

    def nudge(self) -> int:
        """Change every weight a little; how many bytes the next version has."""
        tensors, _ = self._policy.export()
        for array in tensors.values():
            array += np.float32(1e-4)  # a view of the weights
        return sum(array.nbytes for array in tensors.values())

    def put_plain(self) -> list[Any]:
        """A state dict as it is; in a list, since Ray would wait for a bare reference."""
        import ray

        return [ray.put(self._policy._model.state_dict())]


class Worker(RolloutActor):
    """A rollout worker that can also load what nobody proved."""

    def nothing(self) -> None:
        """One call."""

    def get_plain(self, held: list[Any]) -> None:
        """Load a state dict as its base."""
        import ray

        tensors = {name: tensor.numpy() for name, tensor in ray.get(held[0]).items() if name != "lm_head.weight"}
        self._worker._engine.call(lambda engine: engine.load_base(tensors)).result()


class Fleet:
    """Policies of both kinds and the most workers any case needs, on a Ray of their own."""

    def __init__(self, base: Path, most: int) -> None:
        import ray

        self._version = 0
        self.policies = {kind: ray.remote(Policy).options(num_cpus=0).remote(_policy(base, kind)) for kind in _ADAPTER}
        config = RolloutConfig(group_size=8, slots=8)
        spec = WorkerSpec(base=base, dtype="float32", config=config, seed=0, max_length=64, stop_token_ids=())
        names = [f"worker-{i}" for i in range(most)]
        role = ray.remote(Worker).options(num_cpus=0, max_concurrency=4)
        self.workers = [role.remote(name, spec) for name in names]
        ray.get([worker.build.remote() for worker in self.workers], timeout=_SECONDS)
        self.bytes: dict[str, int] = {
            kind: ray.get(policy.nudge.remote(), timeout=_SECONDS) for kind, policy in self.policies.items()
        }

    def publish(self, kind: str, workers: int) -> tuple[float, float]:
        """One round of ours."""
        import ray

        policy, self._version = self.policies[kind], self._version + 1
        ray.get(policy.nudge.remote())
        began = time.perf_counter()
        weights: WeightVersion = ray.get(policy.publish.remote(self._version, ()), timeout=_SECONDS)
        published = time.perf_counter() - began
        proved = ray.get([w.set_weights.remote(weights) for w in self.workers[:workers]], timeout=_SECONDS)
        took = time.perf_counter() - began
        assert set(proved) == {weights.digest}
        return published, took

    def plain(self, workers: int) -> tuple[float, float]:
        """One round of a state dict through Ray."""
        import ray

        policy = self.policies["full"]
        ray.get(policy.nudge.remote())
        began = time.perf_counter()
        held = ray.get(policy.put_plain.remote(), timeout=_SECONDS)
        published = time.perf_counter() - began
        ray.get([w.get_plain.remote(held) for w in self.workers[:workers]], timeout=_SECONDS)
        return published, time.perf_counter() - began

    def call_seconds(self) -> float:
        """The median of a few calls that do nothing."""
        import ray

        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            ray.get(self.workers[0].nothing.remote())
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)


_ADAPTER: dict[str, dict[str, Any] | None] = {"adapter": {"r": 16}, "full": None}


def _policy(base: Path, kind: str) -> PolicySpec:
    rewards = [{"type": "format", "pattern": "x"}]
    stage = OnlineStage.model_validate({"adapter": _ADAPTER[kind], "data": {"path": "none"}, "rewards": rewards})
    return PolicySpec(base=base, base_digest="base", adapter=None, stage=stage, seed=0, dtype="float32")


def _with_tokenizer(folder: Path) -> Path:
    """A rollout worker reads one, though nothing is decoded here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@contextmanager
def fleet(base: Path, most: int) -> Iterator[Fleet]:
    """A local Ray on all cores, and the fleet on it."""
    import ray
    from raylign.cluster.session import loopback_host

    here = {"_node_ip_address": host} if (host := loopback_host()) else {}
    with all_cores():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **here)
        try:
            yield Fleet(_with_tokenizer(base), most)
        finally:
            ray.shutdown()


def cases() -> list[Case]:
    """Named like `25M-2-workers-adapter-vs-full`."""
    return [
        case
        for size in ("25M", "120M")
        for case in (
            *(_case(size, n, max(_WORKERS), "adapter") for n in _WORKERS),
            _case(size, 1, max(_WORKERS), "full"),
        )
    ]


def quick_cases() -> list[Case]:
    """The smallest model and one worker."""
    return [_case("1M", 1, 1, "adapter"), _case("1M", 1, 1, "full")]


def _case(size: str, workers: int, most: int, ours: str) -> Case:
    theirs, peer = {"adapter": ("full", "all weights"), "full": ("plain", "a state dict through Ray")}[ours]
    return Case(
        name=f"{size}-{workers}-worker{'s' * (workers > 1)}-{ours}-vs-{theirs}",
        peer=peer,
        unit="publications/s",
        group=f"{size}-sync",
        make=partial(_contest, size, workers, most, ours, theirs),
    )


def _contest(size: str, workers: int, most: int, ours: str, theirs: str, arena: Arena) -> Contest:
    here: Fleet = arena.entered(fleet, arena.folder(size, "fp32"), most)
    rounds: dict[str, Round] = {kind: partial(here.publish, kind, workers) for kind in _ADAPTER}
    rounds["plain"] = partial(here.plain, workers)
    here.bytes["plain"] = here.bytes["full"]
    settings: dict[str, Any] = {
        "workers": workers,
        "rounds_a_repetition": {kind: _ROUNDS[kind] for kind in (ours, theirs)},
        "megabytes": {kind: round(here.bytes[kind] / 1e6, 1) for kind in (ours, theirs)},
        "milliseconds": {},
    }
    notes: dict[str, list[Any]] = {ours: [], theirs: [], "limit": []}

    def repeat(kind: str, number: int) -> Measured:
        taken = [rounds[kind]() for _ in range(_ROUNDS[kind])]
        notes[kind] += taken
        settings["milliseconds"][kind] = _spread(notes[kind])
        seconds = sum(took for _, took in taken)
        return Measured(amount=_ROUNDS[kind], seconds=seconds, cpu_seconds=seconds)

    def limit() -> float:
        rate, call = copy_rate(), here.call_seconds()
        found = {kind: here.bytes[kind] / rate + call for kind in (ours, theirs)} | {"call": call}
        notes["limit"].append(found)
        medians = {kind: statistics.median(note[kind] for note in notes["limit"]) * 1e3 for kind in found}
        settings["milliseconds"]["limit"] = {kind: round(value, 3) for kind, value in medians.items()}
        return 1 / found[ours]

    def warm_up() -> None:
        until = time.monotonic() + _WARM_UP_SECONDS
        while True:
            for kind in (ours, theirs):
                rounds[kind]()
            if time.monotonic() > until:
                return

    return Contest(
        ours=partial(repeat, ours), theirs=partial(repeat, theirs), warm_up=warm_up, limit=limit, settings=settings
    )


def _spread(taken: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds: half until published, half and 99 of 100 until the last worker had it."""
    published, took = np.array(taken).T * 1e3
    quantiles = {"published_p50": (published, 0.5), "p50": (took, 0.5), "p99": (took, 0.99)}
    return {name: round(float(np.quantile(values, q)), 3) for name, (values, q) in quantiles.items()}


def copy_rate() -> float:
    """Bytes per second of a copy in memory, the best of three."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return _COPY_BYTES / min(seconds)
