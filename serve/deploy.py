"""Start and stop a service on a Ray that this process is connected to."""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from ..cluster.errors import DoesNotFit, InputError, RunFailed
from ..cluster.placement import offers
from ..cluster.planning import Demand, plan
from .config import Replicas, ServeConfig
from .keys import keys_path, read_keys
from .registry import Registry
from .replica import BuildEngine, ReplicaSpec, native_engine

_MAX_ONGOING = 4096
"""Requests a replica takes at once: those that are too many for it, it refuses itself. Ray Serve's default is 5."""
_POLL_SECONDS = 0.1
_UPSCALE_SECONDS = 3.0
"""How long there must be more to do before a replica is added: they take longer than that to start."""


def start(
    config: ServeConfig,
    *,
    name: str,
    base: Path,
    registry: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    build: BuildEngine = native_engine,
    timeout: float = 120.0,
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Serve a base model and every adapter of it in the registry; gives the URL (clients add `/v1`) once it answers.

    One Ray has one HTTP port: the first service takes its root, further ones get `/<name>`. A service of that name that
    already runs is updated: new replicas answer before the old ones finish what they have and end. Raises `InputError`
    for a host other than loopback where there are no API keys, or a port that is taken, `DoesNotFit` when replicas are
    larger than the cluster, or found no place within `timeout` seconds, `RunFailed` when one failed. `tick` is called
    several times a second while it waits; what that raises ends the start too. Whatever ends it, nothing of the service
    is left, or where it ran before, its old replicas go on answering.
    """
    _quiet()
    _check_host(config.host, registry)
    each = config.resources
    plan([Demand("serve replica", config.replicas.start, each.cpus, each.gpus, labels=each.labels)], offers())
    entry = Registry(registry).register_base(base)
    deadline = time.monotonic() + timeout
    port = _open_port(config.host, config.port)
    updates = _runs(name)
    try:
        prefix = _deploy(name, service_of(config, base=entry.digest, registry=registry, dtype=dtype, build=build))
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{port}{prefix.rstrip('/')}"
        _wait_until_running(name, config, deadline, tick)
        _wait_until_healthy(url, deadline, tick)
    except BaseException:
        if not updates:
            stop(name)
        raise
    return url


def _runs(name: str) -> bool:
    from ray import serve

    there = serve.status().applications.get(name)
    return there is not None and there.status == "RUNNING"


def _quiet() -> None:
    """Keep Ray Serve's notices off the terminal; its import sets the level, so it comes first."""
    from ray import serve

    logging.getLogger(serve.__name__).setLevel(logging.WARNING)


def _deploy(name: str, deployment: Any) -> str:
    """Hand an application to Ray Serve; returns its route prefix."""
    from ray import serve

    prefix = _prefix(name)
    target = serve.RunTarget(
        target=deployment,
        name=name,
        route_prefix=prefix,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run_many([target], wait_for_applications_running=False)
    return prefix


def stop(name: str) -> None:
    """End a service, if there is one; with the last one Ray Serve ends too, and its port is free again."""
    from ray import serve

    applications = serve.status().applications
    if name in applications:
        serve.delete(name)
    if not set(applications) - {name}:
        _end_ray_serve(deadline=time.monotonic() + 30)


def _end_ray_serve(deadline: float) -> None:
    """What `serve.shutdown` does, without the call that dies with the controller: Ray tells the user of each of those.

    Raises `RunFailed` if the controller still lives at the deadline.
    """
    import ray
    from ray.exceptions import ActorDiedError
    from ray.serve.context import _disconnect, _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    with suppress(ActorDiedError):  # where little is to be shut down, it has ended before its answer is here
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=30)
    while _get_controller():
        if time.monotonic() > deadline:
            raise RunFailed("Ray Serve did not end within 30 s: its controller still lives")
        time.sleep(_POLL_SECONDS)
    _disconnect()


def _get_controller() -> Any:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def service_of(
    config: ServeConfig,
    *,
    base: str,
    registry: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    build: BuildEngine = native_engine,
) -> Any:
    """The service of a registered base, by its digest, as Ray Serve deploys it."""
    from ray import serve

    from .replica import Replica

    spec = ReplicaSpec(
        base=base,
        registry=registry.resolve(),
        slots=config.slots,
        max_length=config.max_length,
        dtype=dtype,
        device="cuda" if config.resources.gpus else "cpu",
        limits=config.limits,
        rollback=config.rollback,
    )
    deployed = serve.deployment(
        serve.ingress()(Replica),
        name="Replica",
        **_count(config.replicas),
        max_ongoing_requests=_MAX_ONGOING,
        max_surge_percent=100,  # an update starts the new replicas before it drains the old ones
        ray_actor_options={
            "num_cpus": config.resources.cpus,
            "num_gpus": config.resources.gpus,
            **({"label_selector": config.resources.labels} if config.resources.labels else {}),
        },
        graceful_shutdown_timeout_s=config.drain_seconds,
        max_constructor_retry_count=2,
    )
    return deployed.bind(spec, build)


def _count(replicas: Replicas) -> dict[str, Any]:
    """The number of replicas as Ray Serve takes it: one that stays, or the bounds in which it follows the load."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    bounds = {
        "min_replicas": replicas.min,
        "initial_replicas": replicas.start,
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.requests,
        "upscale_delay_s": _UPSCALE_SECONDS,
        "downscale_delay_s": replicas.idle_seconds,
    }
    return {"autoscaling_config": bounds}


def _check_host(host: str, registry: Path) -> None:
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        require_keys(registry, f"serve.host {host!r} is not loopback")


def require_keys(registry: Path, because: str = "the service listens on a network") -> None:
    """Raise `InputError` where a registry's service has no API keys."""
    keys = keys_path(registry)
    if not read_keys(keys):
        raise InputError(
            f"{because}, and there are no API keys in {keys}: make one with `raylign keys add NAME`, or listen on "
            "127.0.0.1"
        )


def _open_port(host: str, port: int) -> int:
    """The HTTP port of this Ray's Serve, which is started if it does not run."""
    from ray import serve
    from ray.serve.context import _get_global_client

    if client := _get_global_client(raise_if_no_controller_running=False):
        running = client.http_config.port
        if port not in (0, running):
            raise InputError(f"serve.port {port}: this Ray already serves on port {running}; take that one or 0")
        return running
    port = _free_port(host, port)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return port


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"serve.port {port} on {host} can't be used: {error.strerror}; 0 takes a free one"
            ) from None
        return probe.getsockname()[1]


def _prefix(name: str) -> str:
    """The root, unless another application of this Ray has it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    details = client.get_serve_details()["applications"] if client else {}
    taken = any(other != name and app["route_prefix"] == "/" for other, app in details.items())
    return f"/{name}" if taken else "/"


def _wait_until_running(name: str, config: ServeConfig, deadline: float, tick: Callable[[], None]) -> None:
    from ray import serve

    while (app := serve.status().applications[name]).status != "RUNNING":
        tick()
        reasons = [app.message, *(deployment.message for deployment in app.deployments.values())]
        reason = next((message for message in reasons if message), app.status)
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RunFailed(f"service {name!r} did not start: {reason}")
        if time.monotonic() > deadline:
            raise DoesNotFit(
                f"service {name!r} has no place: {config.replicas.start} replicas with {config.resources.cpus:g} CPUs "
                f"and {config.resources.gpus:g} GPUs each; Ray Serve says: {reason}"
            )
        time.sleep(_POLL_SECONDS)


def _wait_until_healthy(url: str, deadline: float, tick: Callable[[], None]) -> None:
    import httpx

    answer = "no answer"
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            tick()
            try:
                response = client.get(f"{url}/health", timeout=5)
            except httpx.TransportError as error:
                answer = type(error).__name__
            else:
                if response.status_code == 200:
                    return
                answer = f"status {response.status_code}"
            time.sleep(_POLL_SECONDS)
    raise RunFailed(f"{url}/health does not answer: {answer}")
