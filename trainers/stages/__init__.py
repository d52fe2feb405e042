"""The stages of a recipe: one frozen config a training method. Imports neither ray nor torch."""

from typing import Annotated

from pydantic import Field

from .adapters import AnyAdapter, LoraConfig
from .algorithms import ALGORITHMS, Algorithm
from .base import DataConfig, DataFormat, SourceConfig, SplitConfig, StageBase
from .blocks import (
    AdaptiveKl,
    Aggregation,
    ClipConfig,
    CriticConfig,
    Estimator,
    KlConfig,
    MismatchConfig,
    Ratio,
    Scale,
)
from .learners import LearnerResources
from .offline import (
    CptStage,
    DistillStage,
    DpoStage,
    KtoStage,
    OrpoStage,
    ProcessRewardModelStage,
    RewardModelStage,
    SftStage,
    SimpoStage,
    TeacherConfig,
    TrainStage,
    TrainWorkers,
)
from .online import OnlineStage
from .watch import AlarmsConfig, EarlyStop, HeldOutConfig

OfflineStage = (
    CptStage
    | SftStage
    | DpoStage
    | KtoStage
    | OrpoStage
    | SimpoStage
    | DistillStage
    | RewardModelStage
    | ProcessRewardModelStage
)
StageConfig = Annotated[OfflineStage | OnlineStage, Field(discriminator="type")]

__all__ = [
    "ALGORITHMS",
    "AdaptiveKl",
    "Aggregation",
    "AlarmsConfig",
    "Algorithm",
    "AnyAdapter",
    "ClipConfig",
    "CptStage",
    "CriticConfig",
    "DataConfig",
    "DataFormat",
    "DistillStage",
    "DpoStage",
    "EarlyStop",
    "Estimator",
    "HeldOutConfig",
    "KlConfig",
    "KtoStage",
    "LearnerResources",
    "LoraConfig",
    "MismatchConfig",
    "OfflineStage",
    "OnlineStage",
    "OrpoStage",
    "ProcessRewardModelStage",
    "Ratio",
    "RewardModelStage",
    "Scale",
    "SftStage",
    "SimpoStage",
    "SourceConfig",
    "SplitConfig",
    "StageBase",
    "StageConfig",
    "TeacherConfig",
    "TrainStage",
    "TrainWorkers",
]
