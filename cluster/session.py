"""A connection to Ray for the time of a run: a local Ray that ends with it, or a cluster that stays."""

import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import tls, watchdog
from .auth import ask_for_token, token_file
from .config import ClusterConfig
from .errors import ClusterUnreachable, InputError
from .processes import MARK, end, members, started
from .worker_logs import into_the_log

NO_METRICS_PORTS = {
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
}
"""The environment of a Ray on this machine: its servers of metrics would listen to every network, and ask for no token.

Two of them have no switch; a port that is none keeps them from starting.
"""

NAMESPACE = "raylign"
"""Where the named actors of all runs live; their names begin with the run's."""


@dataclass(frozen=True, slots=True)
class Session:
    """A Ray that this process is connected to.

    `address` is `host:port` of its control store, `dashboard_url` where its dashboard, state and jobs API answer (none
    without a dashboard), `local` whether it was started for this session and ends with it.
    """

    address: str
    dashboard_url: str | None
    local: bool


@contextmanager
def connect(config: ClusterConfig, *, dashboard: bool = True) -> Iterator[Session]:
    """Connect to the cluster of the recipe, or start a local Ray and end all its processes on exit.

    The address is the config's, or `RAY_ADDRESS`, which Ray sets inside a job; a process that is connected already
    keeps its connection. `RAY_ADDRESS` is set for the time of the session, for this process and for local workers:
    without it parts of Ray Train give up where several Rays run on one machine. What this process does on SIGTERM stays
    as it was; Ray would have it exit at once. Raises `ClusterUnreachable`.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        if ray.is_initialized():
            session = _current(local=False)
        elif address:
            session = stack.enter_context(_existing(address))
        else:
            session = stack.enter_context(_local(config, dashboard))
        stack.enter_context(_environment(RAY_ADDRESS=session.address))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        yield session


@contextmanager
def _local(config: ClusterConfig, dashboard: bool) -> Iterator[Session]:
    import ray

    ask_for_token(make=True)
    mark, host, port = uuid.uuid4().hex, loopback_host() or ray.util.get_node_ip_address(), free_port()
    watch = watchdog.start(mark)
    folder = Path(os.devnull)
    try:
        # Ray's processes inherit these and pass them on to the workers; our own children do not.
        inherited = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{host}:{port}", MARK: mark}
        with _environment(**inherited, **NO_METRICS_PORTS):
            ray.init(
                address="local",
                num_cpus=config.cpus,
                namespace=NAMESPACE,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port("127.0.0.1"),  # 8265 is for a cluster that stays
                log_to_driver=True,
                logging_level=logging.WARNING,
                _node_ip_address=host,
            )
        folder = Path(_session_folder())
        watchdog.tell(watch, folder)
        with into_the_log():
            yield _current(local=True)
    finally:
        known = [started(p) for p in members(mark, folder)]
        ray.shutdown()
        end(lambda: members(mark, folder, known))
        watchdog.dismiss(watch)


@contextmanager
def _existing(address: str) -> Iterator[Session]:
    import ray

    probe(address)
    ask_for_token(make=False)  # of an address that cannot be probed too
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {_first_line(error)}") from error
    try:
        with into_the_log():
            yield _current(local=False)
    finally:
        ray.shutdown()


def probe(address: str) -> None:
    """Find out in seconds what `ray.init` says after two minutes: nobody listens, or the token is wrong.

    The token of this user is used from then on. Raises `ClusterUnreachable`, and `InputError` for what is no address.
    """
    if address == "auto" or address.startswith("ray://"):
        return
    if "://" in address:
        raise InputError(f"cluster.address {address!r} is a jobs URL: use `raylign submit --address {address}`")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"cluster.address {address!r} needs the form host:port, such as 10.0.0.5:6379")
    require_listener(host, int(port), address)
    tls.require_same(host, int(port))
    ask_for_token(make=False)
    _check_token(address)


def require_listener(host: str, port: int, address: str, seconds: float = 5.0) -> None:
    """Raise `ClusterUnreachable`, naming `address`, if nothing listens there."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"no Ray cluster answers at {address} ({error}): is it up? `raylign up --local` starts one here"
        ) from None


def _check_token(address: str) -> None:
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError, RpcError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise ClusterUnreachable(wrong_token(address)) from None
    except (RpcError, RuntimeError) as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {_first_line(error)}") from None


def wrong_token(address: str) -> str:
    """What to say when a cluster refuses our token."""
    return (
        f"the cluster at {address} refuses the token: put its token into {token_file()}, "
        "or set RAY_AUTH_TOKEN_PATH to a file that holds it, and RAY_AUTH_MODE=token"
    )


def _session_folder() -> str:
    from ray._private import worker

    assert worker._global_node is not None
    return worker._global_node.get_session_dir_path()


def _current(*, local: bool) -> Session:
    import ray
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url()
    return Session(ray.get_runtime_context().gcs_address, f"http://{url}" if url else None, local)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def loopback_host(number: int = 2) -> str | None:
    """The loopback address 127.0.0.`number`, or none where the system has only one.

    Ray replaces 127.0.0.1 by an address of the network, which a laptop may lose while a run goes on; it keeps the
    others.
    """
    host = f"127.0.0.{number}"
    if not sys.platform.startswith("linux"):
        return None
    with closing(socket.socket()) as sock:
        try:
            sock.bind((host, 0))
        except OSError:
            return None
    return host


def free_port(host: str = "") -> int:
    """A TCP port that nobody listens on now."""
    with closing(socket.socket()) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
