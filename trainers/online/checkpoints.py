"""Checkpoints: a folder a step, written beside its place, fsynced, renamed; valid only with its manifest of digests.

A checkpoint is begun and finished: in between, those who learn write into its draft. Until it is finished it does not
count, and the one before it is the last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

Fill = Callable[[Path], object]
"""Puts files into the folder of a checkpoint, or has others begin to."""


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


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank of those who learn has put into the folder of a checkpoint."""

    folder: Path
    digests: dict[str, str]
    """File, within the folder → SHA-256."""
    bytes: int
    seconds: float
    """From the end of the copy in memory until all lay on the disk."""


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
        self.draft: Draft | None = None
        """The one that was begun and is not finished."""

    @property
    def newest(self) -> int | None:
        """The step of the one that was begun last."""
        return self.draft.step if self.draft else self.saved

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid one, and the names of newer ones that are not; what follows goes on from it."""
        self.drop()
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
        """Take in a step's metrics, or those of held-out prompts.

        Raises `InputError` where a step lacks the one that `keep_best` goes by.
        """
        best = self._stage.keep_best
        if best is None:
            return
        if best.metric not in metrics:
            # a step without a sound group has nothing to measure, and held-out prompts are not asked after each
            if "reward/mean" in metrics and not best.metric.startswith("held_out/"):
                known = ", ".join(sorted(metrics))
                raise InputError(f"keep_best.metric {best.metric!r} is no metric of a step: there are {known}")
            return
        self._scores.append(metrics[best.metric] * (1 if best.mode == "max" else -1))

    def begin(self, step: int, state: dict[str, Any], fill: Fill) -> None:
        """Begin one; raises as `Draft.begin` does."""
        scored = {"score": sum(self._scores) / len(self._scores)} if self._scores else {}
        self.draft = Draft.begin(self._root, step, {**self._facts, **state, **scored}, fill)
        self._scores = []

    def finish(self, digests: Mapping[str, str]) -> None:
        """Finish the one that was begun; raises as `Draft.finish` does."""
        assert self.draft, "nothing was begun"
        draft, self.draft = self.draft, None
        best = self._stage.keep_best
        draft.finish(digests, Keep(self._stage.keep_last, best.count if best else 0))
        self.saved = draft.step

    def drop(self) -> None:
        """Give up the one that was begun, if any, and its space."""
        if self.draft:
            self.draft.drop()
        self.draft = None

    def way_on(self, stage: str, run: str) -> str:
        """Where `raylign resume` would go on."""
        if self.saved is None:
            return f"stage {stage} has no checkpoint yet: `raylign resume {run}` begins it again"
        return f"the last checkpoint is step {self.saved}: `raylign resume {run}` goes on from it"


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint under way, beside its place: `step` counts the finished steps that it holds."""

    root: Path
    step: int
    state: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its files are put together."""
        return self.root / f".step-{self.step:06d}"

    @classmethod
    def begin(cls, root: Path, step: int, state: dict[str, Any], fill: Fill) -> "Draft":
        """Have `fill` put files into its folder, or begin to. Drafts that were left by others go.

        One that cannot be written leaves nothing: where the disk is full, that is a `RunFailed`.
        """
        for left in root.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        draft = cls(root, step, state)
        with draft._or_nothing():
            draft.folder.mkdir(parents=True)
            fill(draft.folder)
        return draft

    def finish(self, digests: Mapping[str, str], keep: Keep = _KEEP) -> Checkpoint:
        """Make it `root/step-000120`, with `state.json` and a manifest of digests.

        `digests` are those of files that lie on the disk; other files of the folder are digested and synced here. A
        checkpoint of that step that is there already is replaced; of those up to this step those stay that `keep` says.
        Torn ones are set aside as `torn-step-000130`, so that they do not count. Raises as `begin` does.
        """
        final = self.root / self.folder.name[1:]
        with self._or_nothing():
            (self.folder / "state.json").write_text(json.dumps(self.state | {"step": self.step}))
            others = {name: path for name, path in _files(self.folder).items() if name not in digests}
            manifest = {**digests, **{name: _digest(path) for name, path in others.items()}}
            (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
            folders = [path for path in self.folder.rglob("*") if path.is_dir()]
            for path in [*others.values(), self.folder / "manifest.json", *folders, self.folder]:
                _fsync(path)
            if final.exists():
                shutil.rmtree(final)
            os.rename(self.folder, final)
        _fsync(self.root)
        _prune(self.root, final, keep)
        return Checkpoint(final, self.step, self.state)

    def drop(self) -> None:
        """Take its files away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.drop()  # on a full disk its space is what the user needs
            if isinstance(error, OSError):
                raise RunFailed(
                    f"the checkpoint of step {self.step} cannot be written to {self.root}: {error.strerror}"
                ) from error
            raise


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
    return bool(manifest) and set(manifest) == set(_files(folder))


def _is_valid(folder: Path) -> bool:
    return _is_complete(folder) and _manifest(folder) == {n: _digest(path) for n, path in _files(folder).items()}


def _files(folder: Path) -> dict[str, Path]:
    """The files that a manifest counts, by their names in it."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name != "manifest.json"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
