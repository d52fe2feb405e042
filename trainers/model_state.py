"""What passes from stage to stage: a base folder, perhaps an adapter on it, and what the stage says of itself."""

from dataclasses import dataclass, field
from pathlib import Path

from ..cluster.rundir import RunDir
from .adapters import check_adapter, merge_adapter
from .config import stage_name
from .stages import CptStage, LoraConfig, ProcessRewardModelStage, RewardModelStage, StageConfig


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as folders: an ordinary Hugging Face folder and, on it, an ordinary PEFT folder or none."""

    base: Path
    adapter: Path | None = None


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
    reward_model: Path | None = None
    """The folder of the reward model that it made instead of a policy."""


def starting_model(stage: StageConfig, index: int, model: ModelState, run: RunDir) -> ModelState:
    """The model a stage trains, given what the stage before left.

    A stage without an adapter block goes on training the adapter it gets. One with a block, `cpt`, which trains all
    weights, and reward models, which have another head, start from the former adapter merged into a new base (in
    float32, written once), and with the block's own `path` if it has one. Raises `InputError` where an adapter does not
    fit its base.
    """
    own = stage.adapter
    if model.adapter and (own or isinstance(stage, CptStage | RewardModelStage | ProcessRewardModelStage)):
        merged = run / "models" / f"{index}-{stage_name(stage)}-base"
        model = ModelState(merged if merged.exists() else merge_adapter(model.base, model.adapter, merged))
    if isinstance(own, LoraConfig) and own.path:
        model = ModelState(model.base, Path(own.path))
    if model.adapter:
        check_adapter(model.adapter, model.base)
    return model
