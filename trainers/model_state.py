"""What passes from stage to stage: a base folder, perhaps an adapter on it, and what the stage says of itself."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as folders: an ordinary Hugging Face folder and, on it, an ordinary PEFT folder or none."""

    base: Path
    adapter: Path | None = None

    @property
    def digest(self) -> str | None:
        """The adapter's digest, which is its folder's name."""
        return self.adapter.name if self.adapter else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What a stage left: its model, last metrics, finished steps, seconds, and whether it was asked to end early."""

    model: ModelState
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    stopped: bool = False
    restarts: int = 0
    version: int = 0
    """Weight version published last; 0 for an offline stage."""
    workers: tuple[int, int] = (1, 1)
    """Fewest and most workers seen."""
