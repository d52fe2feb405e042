"""The part of a recipe that speaks of the cluster, and the base of every config class.

Imports neither ray nor torch: recipe errors must come back at once.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A name of a run, adapter or alias: safe in a path, a URL and an actor name."""


class Config(BaseModel):
    """Base of all configs: frozen, keyword-only, refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        """Refuse an unknown key with the nearest known one; pydantic alone would not name it."""
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "unknown key '{key}': {hint}", {"key": str(key), "hint": hint})
        return value


class Resources(Config):
    """What one actor or one training worker reserves."""

    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    """Part of one GPU, which others may share, or whole ones."""
    labels: dict[str, str] = Field(default_factory=dict)
    """On nodes with these labels alone, as Ray selects them: `{ray.io/market-type: spot}`, also `"!spot"`, `"in(a, b)"`
    and `"!in(a, b)"`. Nodes get theirs with `ray start --labels` or from the cloud."""

    @field_validator("gpus")
    @classmethod
    def _is_a_part_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError(f"{gpus:g}: an actor has a part of one GPU or whole ones; take {gpus // 1:g}")
        return gpus


class RoleResources(Resources):
    """What each actor of a role reserves, and where it stands; with neither wish, on any node that has room.

    Those who follow the one who is named choose their node after it, and move when it does.
    """

    colocate_with: str | None = None
    """On the node of that role, of its first actor where it has several."""
    split_from: tuple[str, ...] = ()
    """On no node that one of these roles uses. A recipe may write a single name."""

    @field_validator("split_from", mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class ElasticWorkers(Config):
    """How many workers a role has at the start, and the bounds that `raylign scale` may move it in.

    A plain number in the recipe (`workers: 2`) sets all three.
    """

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)
    start: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": value, "start": value}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "ElasticWorkers":
        if not self.min <= self.start <= self.max:
            raise ValueError(f"needs min <= start <= max, not {self.min}, {self.start}, {self.max}")
        return self


_AUTO_MOST = 8


class RolloutWorkers(ElasticWorkers):
    """How many rollout workers; `workers: auto` is 1 to 8, as many as generation needs beside the update."""

    auto: bool = False
    """Follow the measured ratio of generation to update time, until `raylign scale` asks for a number."""

    @model_validator(mode="before")
    @classmethod
    def _from_auto(cls, value: object) -> object:
        if type(value) is ElasticWorkers:
            return value.model_dump()
        return {"min": 1, "max": _AUTO_MOST, "auto": True} if value == "auto" else value


class WeightsConfig(Config):
    """How new weights reach rollout workers."""

    transport: Literal["object_store", "nccl"] = "object_store"
    """Through Ray's object store, where workers may come and go, or by broadcast to a fixed fleet of GPU workers. The
    broadcast's ports know no token: keep it on a network of your own."""
    on_loss: Literal["object_store", "fail"] = "object_store"
    """What a broken NCCL group means: the version comes through the object store and the next through a new group, or
    the end of the run."""


class ControllerConfig(Config):
    """How the process that controls a run is healed when it dies; the run goes on from its last checkpoint."""

    max_restarts: int = Field(default=5, ge=0)
    """How often, without a new checkpoint in between, it is started again; 0 lets it run without a supervisor."""
    pause_seconds: float = Field(default=1.0, ge=0)
    """How long to wait before that; twice as long each further time, a minute at most."""
    hang_seconds: float = Field(default=60.0, gt=0)
    """How long it may be suspended before it counts as dead."""
    max_hours: float | None = Field(default=None, gt=0)
    """How long a run may work before it is stopped, with a checkpoint; a resumed one has as long again."""


class ClusterConfig(Config):
    """Which Ray cluster to use; without an address the run starts a local one and ends it."""

    address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    """CPUs that a local Ray offers; the machine's by default."""
    wait_seconds: float = Field(default=120.0, gt=0)
    """How long an actor may stay unplaced before the run stops with the reason."""
    autoscaler: bool = False
    """Whether nodes come when they are needed: a run then begins though its roles do not fit yet, and waits for places
    as long as `wait_seconds` says, which should be longer than a node takes to come."""
    after: tuple[Name, ...] = ()
    """Runs of the same storage that have to succeed before this one begins."""
    priority: int | None = None
    """The run's place in the queue of its cluster, where it waits until what it asks for is free: higher ones first.
    Without a number it does not queue, and stops after `wait_seconds` where the cluster is busy."""
