"""The part of a recipe that speaks of serving. Imports neither ray nor torch."""

from pydantic import Field

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


class ServeConfig(Config):
    """What a finished run serves and where it listens."""

    alias: Name
    """The name that is pointed at the run's last adapter, if that passes the evaluation."""
    tolerance: float = Field(default=0.0, ge=0, le=1)
    """How much lower a new model's accuracy may be than that of the model the alias points at."""
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port."""
    replicas: int = Field(default=1, ge=1)
    slots: int = Field(default=64, ge=8)
    """Rows a replica decodes at once."""
    max_length: int = Field(default=2048, ge=1)
    """The most tokens of prompt and completion together."""
    limits: Limits = Limits()
    rollback: Guard = Guard()
    resources: Resources = Resources()
