"""The stages of a recipe: one frozen config a training method. Imports neither ray nor torch."""

from typing import Annotated

from pydantic import Field

from .base import DataConfig, DataFormat, LoraConfig, StageBase
from .offline import CptStage, DpoStage, SftStage, TrainStage
from .online import ClipConfig, KlConfig, OnlineStage

StageConfig = Annotated[CptStage | SftStage | DpoStage | OnlineStage, Field(discriminator="type")]

__all__ = [
    "ClipConfig",
    "CptStage",
    "DataConfig",
    "DataFormat",
    "DpoStage",
    "KlConfig",
    "LoraConfig",
    "OnlineStage",
    "SftStage",
    "StageBase",
    "StageConfig",
    "TrainStage",
]
