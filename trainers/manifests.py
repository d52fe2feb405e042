"""From a recipe to the files that start a cluster of its size."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.errors import InputError
from ..cluster.manifests.kuberay import STORAGE, Site, ray_cluster, ray_job, ray_service
from ..cluster.manifests.ray_up import Machines, ray_up
from .config import RunConfig
from .recipe import load_recipe
from .shipping import outside_paths, paths_as_written, paths_inside
from .sizing import Shape, folder_files, groups_of

_LABEL = re.compile(r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$")
"""What Kubernetes takes as the name of a resource from which it makes others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says of the place."""

    name: str | None = None
    image: str = "raylign:latest"
    claim: str = "raylign-storage"
    namespace: str | None = None
    secrets: tuple[str, ...] = ()
    """`VARIABLE=SECRET:KEY`."""
    gpus_per_node: int = 8
    region: str = ""
    project: str = ""
    machines: tuple[str, ...] = ()
    """`GROUP=TYPE`."""
    spot: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_hours: float | None = None


def manifests(recipe: Path, overrides: Sequence[str], kind: str, options: Options) -> list[dict[str, Any]]:
    """The manifests of a `kind`: cluster, job, service (KubeRay) or aws, gcp, hosts (`ray up`). Raises `InputError`."""
    config = load_recipe(recipe, list(overrides))
    name = options.name or config.name
    groups = groups_of(config, Shape(gpus=options.gpus_per_node))
    if kind in ("aws", "gcp", "hosts"):
        return [ray_up(name, groups, _machines(kind, options))]
    _require_label(name)
    site = _site(options)
    if kind == "cluster":
        return [ray_cluster(name, groups, site)]
    if kind == "service":
        return [ray_service(name, groups, site, application=_application(config))]
    _require_mounted(config, recipe, overrides)
    hours = options.max_hours or config.controller.max_hours
    files = _files(config, recipe)
    return ray_job(name, groups, site, recipe=recipe.name, files=files, overrides=overrides, max_hours=hours)


def _machines(kind: Any, options: Options) -> Machines:
    pairs = [text.partition("=") for text in options.machines]
    for group, _, machine in pairs:
        if not group or not machine:
            raise InputError(f"--machine {group!r} needs the form GROUP=TYPE, such as head=m5.xlarge")
    return Machines(
        provider=kind,
        region=options.region,
        project=options.project,
        types=tuple((group, machine) for group, _, machine in pairs),
        hosts=options.hosts,
        spot=options.spot,
    )


def _site(options: Options) -> Site:
    import ray

    secrets = {}
    for text in options.secrets:
        found = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=([a-z0-9.-]+):([A-Za-z0-9._-]+)", text)
        if not found:
            raise InputError(f"--secret {text!r} needs the form VARIABLE=SECRET:KEY, such as WANDB_API_KEY=wandb:key")
        secrets[found[1]] = (found[2], found[3])
    return Site(
        image=options.image,
        storage_claim=options.claim,
        secrets=secrets,
        namespace=options.namespace,
        ray_version=ray.__version__,
    )


def _require_label(name: str) -> None:
    if not _LABEL.match(name):
        raise InputError(f"--name {name!r}: Kubernetes takes small letters, digits and '-', 52 at most")


def _require_mounted(config: RunConfig, recipe: Path, overrides: Sequence[str]) -> None:
    """Raise `InputError` for a path that no pod has: outside the folder, and not on the storage."""
    written = paths_as_written(recipe, overrides)
    for key, path in outside_paths(config, recipe.parent).items():
        if not path.startswith(f"{STORAGE}/"):
            said = f"{key} is {written.get(key, path)}"
            raise InputError(f"{recipe}: {said}, which pods do not have: put it beside the recipe or under {STORAGE}")


def _files(config: RunConfig, recipe: Path) -> dict[str, str]:
    """The texts that the recipe reads by their path in its folder: itself, data, Python beside what it names."""
    folder = recipe.resolve().parent
    wanted = {recipe.resolve()}
    for text in paths_inside(config, folder):
        path = Path(text)
        wanted |= set(path.rglob("*")) if path.is_dir() else {path}
        if path.suffix == ".py":
            wanted |= set(path.parent.glob("*.py"))
    found = sorted(path for path in wanted if path.is_file() and "__pycache__" not in path.parts)
    try:
        return folder_files({path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found})
    except UnicodeDecodeError as error:
        raise InputError(f"{recipe}: a file beside it is no text ({error}): put it on the storage") from None


def _application(config: RunConfig) -> str:
    """Ray Serve's configuration: the service of the recipe, of what its run has published on the storage."""
    import yaml

    if not config.serve:
        raise InputError(f"recipe {config.name!r} has no serve section: nothing of it can be served")
    arguments = {"run": config.name, "storage": STORAGE, "serve": config.serve.model_dump(mode="json")}
    application = {
        "name": config.name,
        "route_prefix": "/",
        "import_path": "raylign.serve.application:build",
        "args": arguments,
    }
    return yaml.safe_dump(
        {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "applications": [application],
        },
        sort_keys=False,
    )
