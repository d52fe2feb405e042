"""A stage's checkpoints as its loop makes them: begun with a copy of the state, finished beside the next step."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ...cluster.errors import RaylignError
from ...cluster.rundir import RunDir
from ...cluster.weights import WeightStore
from .carried import keep_carried
from .checkpoints import Checkpoints
from .progress import Progress
from .roles import Roles


class Keeping:
    """Has those who learn write checkpoints of a stage; `tick` is called while it waits for them, and ends no wait."""

    def __init__(
        self, kept: Checkpoints, roles: Roles, weights: WeightStore, run: RunDir, stage: str, tick: Callable[[], None]
    ) -> None:
        self._kept, self._roles, self._weights = kept, roles, weights
        self._run, self._stage, self._tick = run, stage, tick

    def begin(self, step: int, progress: Progress) -> None:
        """Begin to save a step, once the checkpoint before is finished."""
        current = self._weights.current
        state = {"version": current.version, "digest": current.digest, "progress": progress.numbers}

        def save(folder: Path) -> None:
            keep_carried(folder, progress.carried)
            self._roles.save(folder, self._weights.before(), tick=self._tick)

        self._kept.begin(step, state, save)

    def finish(self, *, wait: bool = False) -> None:
        """Finish the checkpoint under way, if those who learn have written it; `wait` for them."""
        draft = self._kept.draft
        if draft and wait:
            self._roles.finish_writing(tick=self._tick)
        written = self._roles.written(draft.folder) if draft else None
        if written is None or self._kept.draft is not draft:  # it was finished during the wait
            return
        self._kept.finish({name: digest for part in written for name, digest in part.digests.items()})
        took, size = max(part.seconds for part in written), sum(part.bytes for part in written)
        self._run.event("checkpoint", stage=self._stage, step=self._kept.saved, seconds=round(took, 3), bytes=size)

    def let_go(self) -> None:
        """Finish the checkpoint under way where that is possible: a run that ends needs not lose its steps, too."""
        if not self._roles.lost:
            with suppress(RaylignError):
                self.finish(wait=True)
        self._kept.drop()
