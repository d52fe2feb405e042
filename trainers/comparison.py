"""Whether two runs of one recipe gave the same: metrics, samples, and the state of their last checkpoints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.rundir import RunDir

CLOCKS = ("time", "seconds/", "scoring/seconds/", "tokens_per_second", "memory/", "workers/", "queue/", "restarts/")
"""How metrics of the machine, not of the recipe, begin."""

_STATE = ("*.safetensors", "optimizer*", "scheduler*", "rng_state*")
"""The files of a checkpoint that say what was learned and how training goes on."""

Step = tuple[str, int]
"""A stage and one of its steps."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs were compared in: of each kind how many items were the same, and which were not."""

    same: dict[str, int]
    different: dict[str, list[str]]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any(self.different.values())


def compare(ours: RunDir, theirs: RunDir) -> Comparison:
    """Compare two runs, whatever their workers, deaths and clocks were."""
    parts: dict[str, tuple[Mapping[Any, Any], Mapping[Any, Any]]] = {
        "steps of metrics": (metrics(ours), metrics(theirs)),
        "steps of samples": (samples(ours), samples(theirs)),
        "files of weights and optimizers": (state(ours), state(theirs)),
        "final weights": (_weights(ours), _weights(theirs)),
    }
    same, different = {}, {}
    for what, (a, b) in parts.items():
        unlike = [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]
        same[what] = len({**a, **b}) - len(unlike)
        different[what] = [_named(key) for key in unlike]
    return Comparison(same, different)


def metrics(run: RunDir) -> dict[Step, dict[str, float]]:
    """What each step said of itself, without clocks."""
    return {
        (m["stage"], m["step"]): {k: v for k, v in m.items() if not k.startswith(CLOCKS)} for m in run.all_metrics()
    }


def samples(run: RunDir) -> dict[Step, list[dict[str, Any]]]:
    """Each step's samples with their groups and the weights they came from: the data, in its order."""
    import pyarrow.parquet as pq

    paths = sorted((run / "samples").glob("*/step-*.parquet"))
    return {(p.parent.name, int(p.stem.rpartition("-")[2])): pq.read_table(p).to_pylist() for p in paths}


def state(run: RunDir) -> dict[str, str]:
    """The digests of weights, optimizer, schedule and random numbers in each stage's last checkpoint."""
    found: dict[str, str] = {}
    for stage in sorted(p for p in (run / "checkpoints").glob("*") if p.is_dir()):
        kept = sorted(stage.glob("step-*"))
        for path in sorted({f for pattern in _STATE for f in kept[-1].rglob(pattern)} if kept else []):
            found[str(path.relative_to(run / "checkpoints"))] = _digest(path)
    return found


def _weights(run: RunDir) -> dict[str, Any]:
    return {"digest": run.summary().get("weights")}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(key: str | Step) -> str:
    return key if isinstance(key, str) else f"{key[0]} step {key[1]}"
