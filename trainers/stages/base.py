"""What all stages of a recipe share: data, adapters, an optimizer. Imports neither ray nor torch."""

from typing import Literal

from pydantic import Field

from ...cluster.config import Config, Name

DataFormat = Literal[
    "auto", "text", "messages", "prompt_completion", "alpaca", "preference", "unpaired", "stepwise", "prompt"
]


class SplitConfig(Config):
    """A part of the rows, chosen by the digest of their content and a seed: a row and its copies are on one side,
    whatever their order and whichever rows come or go."""

    held_out: float = Field(gt=0, lt=1)
    """The share of the rows that is held out."""
    take: Literal["train", "held_out"] = "train"
    seed: int = 0


class SourceConfig(Config):
    """Rows of one file, of all files of a folder or of a data set on the hub, and how to read them.

    `columns` maps the names this toolkit knows (`prompt`, `completion`, `messages`, `chosen`, `rejected`, `text`, …)
    to the file's own.
    """

    path: str
    """A JSONL, JSON, Parquet, CSV or text file or a folder of them, relative to the recipe; `prepared://…` is what the
    recipe's script wrote, `hf://organisation/name` a data set on the hub."""
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    system: str | None = None
    """A system message put before every conversation that has none."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first rows."""
    weight: float = Field(default=1.0, gt=0)
    """How often a pass over the data has these rows: 2 is twice, 0.5 half of them, drawn with the run's seed."""


class DataConfig(SourceConfig):
    """What a stage or an evaluation reads: one source, or several mixed."""

    mixture: tuple[SourceConfig, ...] = ()
    """Further sources, whose rows are mixed in; `weight` says how often each is seen."""
    split: SplitConfig | None = None
    """Only one side of the rows; the other is for an evaluation that has the same split."""


class StageBase(Config):
    """What every stage has: data, an optimizer and a length."""

    name: Name | None = None
    """Names the stage in metrics and in what is served; its type by default."""
    data: DataConfig
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; by default one pass over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step over all workers."""
    learning_rate: float = Field(gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    """3 % of the steps by default."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; a tenth of the stage by default. One is always written at the end and on a stop."""
    keep_last: int = Field(default=2, ge=1)
    """How many checkpoints stay; the one before the newest is for a newest that turns out to be damaged."""
