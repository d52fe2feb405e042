"""The part of a recipe that speaks of serving. Imports neither ray nor torch."""

from pydantic import Field

from ..cluster.config import Config, Name, Resources


class ServeConfig(Config):
    """What a finished run serves and where it listens."""

    alias: Name
    """The name that is pointed at the run's last adapter."""
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free port."""
    replicas: int = Field(default=1, ge=1)
    slots: int = Field(default=64, ge=8)
    """Rows a replica decodes at once."""
    max_length: int = Field(default=2048, ge=1)
    """The most tokens of prompt and completion together."""
    resources: Resources = Resources()
