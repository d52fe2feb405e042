"""Checkpoints: a folder a step, written beside its place, fsynced, renamed; valid only with its manifest of digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError, RunFailed
from ..stages import OnlineStage


@dataclass(frozen=True, slots=True)
class Keep:
    """How many checkpoints stay: the `last`, and beside them the `best`, those whose state has the highest `score`."""

    last: int = 2
    best: int = 0


_KEEP = Keep()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint: where it is, the steps done when it was written, and the controller's state."""

    path: Path
    step: int
    state: dict[str, Any]

    def refuse_another(self, **now: object) -> None:
        """Raise `RunFailed` where its facts differ from those of this run: going on would mix two runs."""
        for key, value in now.items():
            if self.state.get(key) != value:
                raise RunFailed(
                    f"checkpoint {self.path} was made with {key} {self.state.get(key)!r}, and this run has {value!r}: "
                    "put model, data and seed back as they were, or begin another run with --name"
                )


class Checkpoints:
    """A stage's checkpoints: when one is due, what it says, which stay.

    `facts` of the run must be the same on a resume.
    """

    def __init__(self, root: Path, stage: OnlineStage, facts: dict[str, Any]) -> None:
        self._root, self._stage, self._facts = root, stage, facts
        self._scores: list[float] = []
        """What `keep_best` goes by, of the steps since the last one."""
        self.saved: int | None = None
        """The step of the last one."""

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid one, and the names of newer ones that are not; what follows goes on from it."""
        found, broken = latest_checkpoint(self._root)
        self.saved, self._scores = found.step if found else None, []
        if found:
            found.refuse_another(**self._facts)
        return found, broken

    def due(self, step: int) -> bool:
        """Whether there is to be one after so many steps."""
        every = self._stage.checkpoint_every or max(1, self._stage.steps // 10)
        return step % every == 0 or step == self._stage.steps

    def note(self, metrics: dict[str, float]) -> None:
        """Take in a step's metrics. Raises `InputError` where they lack the one that `keep_best` goes by."""
        best = self._stage.keep_best
        if best is None or "reward/mean" not in metrics:  # a step without a sound group has nothing to measure
            return
        if best.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise InputError(f"keep_best.metric {best.metric!r} is no metric of a step: there are {known}")
        self._scores.append(metrics[best.metric] * (1 if best.mode == "max" else -1))

    def save(self, step: int, state: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Write one; raises as `write_checkpoint` does."""
        best = self._stage.keep_best
        scored = {"score": sum(self._scores) / len(self._scores)} if self._scores else {}
        keep = Keep(self._stage.keep_last, best.count if best else 0)
        write_checkpoint(self._root, step, {**self._facts, **state, **scored}, fill, keep)
        self.saved, self._scores = step, []

    def way_on(self, stage: str, run: str) -> str:
        """Where `raylign resume` would go on."""
        if self.saved is None:
            return f"stage {stage} has no checkpoint yet: `raylign resume {run}` begins it again"
        return f"the last checkpoint is step {self.saved}: `raylign resume {run}` goes on from it"


def write_checkpoint(
    root: Path, step: int, state: dict[str, Any], fill: Callable[[Path], None], keep: Keep = _KEEP
) -> Checkpoint:
    """Write `root/step-000120` with what `fill` puts into the folder, `state.json` and a manifest of digests.

    `step` counts finished steps. A checkpoint of that step that is there already is replaced; of those up to this step
    step those stay that `keep` says. Torn ones are set aside as `torn-step-000130`, so that they do not count. One that
    cannot be written leaves nothing: where the disk is full, that is a `RunFailed`.
    """
    final = root / f"step-{step:06d}"
    draft = root / f".{final.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write(draft, step, state, fill)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk its space is what the user needs
        if isinstance(error, OSError):
            raise RunFailed(f"the checkpoint of step {step} cannot be written to {root}: {error.strerror}") from error
        raise
    if final.exists():
        shutil.rmtree(final)
    os.rename(draft, final)
    _fsync(root)
    _prune(root, final, keep)
    return Checkpoint(final, step, state)


def _write(draft: Path, step: int, state: dict[str, Any], fill: Callable[[Path], None]) -> None:
    fill(draft)
    (draft / "state.json").write_text(json.dumps(state | {"step": step}))
    (draft / "manifest.json").write_text(json.dumps(_digests(draft), indent=1))
    for path in [*draft.iterdir(), draft]:
        _fsync(path)


def _prune(root: Path, newest: Path, keep: Keep) -> None:
    """Keep the last and best checkpoints up to `newest`, and whole ones after it; set torn ones aside."""
    kept = []
    for path in sorted(root.glob("step-*")):
        if path == newest or (_is_valid(path) if path.name > newest.name else _is_complete(path)):
            kept += [path] if path.name <= newest.name else []
        else:
            aside = path.with_name(f"torn-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    best = sorted((p for p in kept if _score(p) is not None), key=lambda p: (_score(p), p.name))
    for old in set(kept[: -keep.last]) - set(best[len(best) - keep.best :]):
        shutil.rmtree(old)


def _score(path: Path) -> float | None:
    return json.loads((path / "state.json").read_text()).get("score")


def latest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, if any, and the names of newer ones that were torn or changed."""
    broken = []
    for path in sorted(root.glob("step-*"), reverse=True):
        if _is_valid(path):
            state = json.loads((path / "state.json").read_text())
            return Checkpoint(path, state["step"], state), broken
        broken.append(path.name)
    return None, broken


def _manifest(folder: Path) -> dict[str, str]:
    """The digests that a checkpoint was written with; empty where it has none that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_complete(folder: Path) -> bool:
    """Whether the files of the manifest are there; their digests would be as dear as writing them."""
    manifest = _manifest(folder)
    return bool(manifest) and set(manifest) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def _is_valid(folder: Path) -> bool:
    manifest = _manifest(folder)
    return bool(manifest) and manifest == _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
