"""The service as Ray Serve's own configuration names it: `import_path: raylign.serve.application:build`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..cluster.config import Config, Name
from .config import ServeConfig
from .deploy import require_keys, service_of
from .registry import Registry


class Arguments(Config):
    """What the configuration's `args` hold."""

    run: Name
    """Whose base is served, with every adapter on it."""
    storage: str
    """Where runs and the registry are, on every node."""
    serve: ServeConfig
    dtype: Literal["float32", "bfloat16"] = Field(default="float32")


def build(args: dict[str, Any]) -> Any:
    """A Ray Serve application. Raises `NotFound` where the run has published nothing, and `InputError` where there are
    no API keys, since such a service listens on a network."""
    given = Arguments.model_validate(args)
    registry = Registry(Path(given.storage) / "registry")
    require_keys(registry.root)
    base = registry.resolve(f"{given.run}-base")
    return service_of(given.serve, base=base.digest, registry=registry.root, dtype=given.dtype)
