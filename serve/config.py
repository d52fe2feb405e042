"""The part of a recipe that speaks of serving. Imports neither ray nor torch."""

from typing import Any

from pydantic import Field, model_validator

from ..cluster.config import Config, Name, Resources


class Limits(Config):
    """What a replica takes on; what is more is refused at once, never left to wait for ever."""

    completions: int = Field(default=512, ge=1)
    """Completions that run or wait; a request that would be more is answered 429. One alone is always let in."""
    adapters: int = Field(default=64, ge=1)
    """Adapters that the engine holds; the longest unused leaves for another."""
    request_seconds: float = Field(default=600.0, gt=0)
    """How long an answer may take to its last token; then 504."""
    body_seconds: float = Field(default=30.0, gt=0)
    """How long a client may take to send a request; then 408."""
    body_bytes: int = Field(default=4_000_000, ge=1024)
    """The largest request; larger ones are answered 413 before they are read."""


class Guard(Config):
    """When a replica points a name back at the model before, by what its own requests show."""

    errors: float = Field(default=0.2, ge=0, le=1)
    """Part of a model's requests that may fail."""
    first_token_seconds: float | None = Field(default=None, gt=0)
    """How long half of its requests may wait for their first token; without a bound by default."""
    requests: int = Field(default=20, ge=1)
    """How many a model must have had before anything is held against it."""
    seconds: float = Field(default=600.0, gt=0)
    """How long after a name has moved it is watched."""


class Replicas(Config):
    """How many replicas a service has, following its load between `min` and `max`.

    A plain number in the recipe (`replicas: 2`) sets both. With `min: 0` none is left once nobody asks; the
    next request waits until one is up again.
    """

    min: int = Field(default=1, ge=0)
    max: int = Field(default=1, ge=1)
    requests: int = Field(default=32, ge=1)
    """How many requests at once a replica is meant to have; with more there will be another."""
    idle_seconds: float = Field(default=300.0, ge=0)
    """How long there must have been less to do before a replica is taken away."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": value}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"needs min <= max, not {self.min} and {self.max}")
        return self

    @property
    def start(self) -> int:
        """How many a service begins with: one shows that it answers, also where none may be left later."""
        return max(1, self.min)


class ServeConfig(Config):
    """What a finished run serves and where it listens."""

    alias: Name
    """The name that is pointed at the run's last adapter, if that passes the evaluation."""
    tolerance: float = Field(default=0.0, ge=0, le=1)
    """How much lower a new model's accuracy may be than that of the model the alias points at."""
    max_forgetting: float | None = Field(default=None, ge=0)
    """How much the loss on general text may rise, in nats a token, for a new model to be promoted. Without a bound it
    is only measured, and an alarm from 0.1 on."""
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port."""
    replicas: Replicas = Replicas()
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long a replica that leaves, for an update or since there is less to do, may take to finish its answers."""
    slots: int = Field(default=64, ge=8)
    """Rows a replica decodes at once."""
    max_length: int = Field(default=2048, ge=1)
    """The most tokens of prompt and completion together."""
    limits: Limits = Limits()
    rollback: Guard = Guard()
    resources: Resources = Resources()
