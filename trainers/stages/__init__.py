"""The stages of a recipe: one frozen config a training method. Imports neither ray nor torch."""

from typing import Annotated

from pydantic import Field

from .algorithms import ALGORITHMS, Algorithm
from .base import DataConfig, DataFormat, LoraConfig, SourceConfig, SplitConfig, StageBase
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
from .offline import CptStage, DpoStage, RewardModelStage, SftStage, TrainStage
from .online import OnlineStage
from .watch import AlarmsConfig, EarlyStop, HeldOutConfig

StageConfig = Annotated[CptStage | SftStage | DpoStage | RewardModelStage | OnlineStage, Field(discriminator="type")]

__all__ = [
    "ALGORITHMS",
    "AdaptiveKl",
    "Aggregation",
    "AlarmsConfig",
    "Algorithm",
    "ClipConfig",
    "CptStage",
    "CriticConfig",
    "DataConfig",
    "DataFormat",
    "DpoStage",
    "EarlyStop",
    "Estimator",
    "HeldOutConfig",
    "KlConfig",
    "LearnerResources",
    "LoraConfig",
    "MismatchConfig",
    "OnlineStage",
    "Ratio",
    "RewardModelStage",
    "Scale",
    "SftStage",
    "SourceConfig",
    "SplitConfig",
    "StageBase",
    "StageConfig",
    "TrainStage",
]
