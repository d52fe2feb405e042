"""A Ray cluster of several nodes on this machine: `raylign up --local`, `raylign down`.

Each node is one `ray start` with a loopback address of its own. What was started stands in
`~/.raylign/clusters/<name>.json` (`RAYLIGN_HOME` moves `~/.raylign`), so that `down` finds every process again.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from . import tls
from .auth import ask_for_token, ensure_token, token_file
from .errors import InputError, NotFound, RunFailed
from .processes import MARK, Started, end, members, started
from .rundir import write_atomically
from .session import NO_METRICS_PORTS, free_port, loopback_host

_START_SECONDS = 120
_READY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A cluster that `up` started: where it answers, where its files are, and its processes once it was ready."""

    name: str
    mark: str
    folder: str
    nodes: int
    cpus_per_node: int
    jobs_url: str
    token_file: str
    tls: str = ""
    """The folder of its certificates, where its nodes speak TLS."""
    metrics: bool = False
    """Whether Ray's metrics can be scraped."""
    address: str = ""
    processes: tuple[Started, ...] = ()

    def members(self) -> list[psutil.Process]:
        """Its running processes."""
        return members(self.mark, Path(self.folder), self.processes)


def home() -> Path:
    """Where this toolkit keeps what belongs to the user rather than to a run; open to its owner only."""
    path = Path(os.environ.get("RAYLIGN_HOME") or Path.home() / ".raylign")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def up(
    nodes: int = 1,
    *,
    cpus_per_node: int | None = None,
    port: int = 8265,
    name: str = "local",
    encrypted: bool = False,
    metrics: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> LocalCluster:
    """Start a cluster of `nodes` nodes, its dashboard and jobs API on 127.0.0.1:`port`, behind a token.

    Each node offers `cpus_per_node` CPUs, the machine's by default; where `encrypted`, what they say to each other and
    to drivers goes over TLS, by certificates made for them (see `tls`). With `metrics` Ray's metrics can be scraped:
    its ports for that listen on every network and ask for no token. `say` is told of each step. Raises `InputError`
    if a cluster of that name runs or the port is taken, `RunFailed` with Ray's last words if a node does not start.
    """
    _refuse_second(name)
    _require_free(port)
    ask_for_token(make=True)
    ensure_token()
    folder = _short_folder()
    cluster = LocalCluster(
        name=name,
        mark=uuid.uuid4().hex,
        folder=folder,
        nodes=nodes,
        cpus_per_node=cpus_per_node or os.cpu_count() or 1,
        jobs_url=f"http://127.0.0.1:{port}",
        token_file=str(token_file()),
        tls=str(Path(folder) / "tls") if encrypted else "",
        metrics=metrics,
    )
    _save(cluster)
    try:
        if encrypted:
            hosts = [host for number in range(nodes) if (host := loopback_host(2 + number))]
            tls.make(Path(cluster.tls), ["127.0.0.1", "localhost", socket.gethostname(), *hosts])
        return _start(cluster, port, say)
    except BaseException:
        _remove(cluster)
        raise


def down(name: str = "local") -> int:
    """End every process of a cluster and remove its files; returns how many there were. Raises `NotFound`."""
    cluster = find(name)
    if cluster is None:
        raise NotFound(f"no local cluster {name!r} is up: `raylign up --local` starts one")
    return _remove(cluster)


def find(name: str = "local") -> LocalCluster | None:
    """What `up` noted of a cluster, whether or not it still runs."""
    path = _state(name)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        return LocalCluster(**data | {"processes": tuple((pid, at) for pid, at in data["processes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a cluster's state ({error}): remove it") from None


def _start(cluster: LocalCluster, port: int, say: Callable[[str], None]) -> LocalCluster:
    # One after the other: two that start at once in one session folder take the same socket name, and both die.
    for number in range(cluster.nodes):
        say(f"node {number + 1} of {cluster.nodes}")
        which = _head(port) if number == 0 else ["--address", cluster.address]
        _ray_start(cluster, number, which)
        if number == 0:
            cluster = replace(cluster, address=(_node_folder(cluster, 0) / "ray_current_cluster").read_text().strip())
    say("jobs API")
    _wait_ready(cluster)
    cluster = replace(cluster, processes=tuple(started(p) for p in cluster.members()))
    _save(cluster)
    return cluster


def _head(port: int) -> list[str]:
    return [
        *("--head", "--port", "0", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)),
        *("--include-dashboard", "true", "--ray-client-server-port", str(free_port())),
    ]


def _ray_start(cluster: LocalCluster, number: int, which: list[str]) -> None:
    store = int(min(2e9, max(1e8, 0.3 * psutil.virtual_memory().total / cluster.nodes)))
    host = loopback_host(2 + number)
    command = [
        *(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *which,
            "--temp-dir",
            str(_node_folder(cluster, number)),
        ),
        *(("--node-ip-address", host) if host else ()),
        *("--num-cpus", str(cluster.cpus_per_node), "--object-store-memory", str(store)),
        *("--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"),
        "--disable-usage-stats",
    ]
    log = Path(cluster.folder) / f"start-{number}.log"
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command,
                env=_environment(cluster),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=_START_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"Ray node {number + 1} did not start within {_START_SECONDS} s: {_tail(log)}") from None
    if done.returncode:
        raise RunFailed(f"Ray node {number + 1} did not start: {_tail(log)}")


def _node_folder(cluster: LocalCluster, number: int) -> Path:
    """Where a node keeps its files; in a common folder, a node that unpacks a job's files replaces those others use."""
    return Path(cluster.folder) / str(number)


def _environment(cluster: LocalCluster) -> dict[str, str]:
    """What the nodes inherit: the mark, this interpreter first in PATH for jobs, no other Ray's address."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_JOB_", "RAY_ADDRESS", "RAY_API_SERVER"))}
    return kept | {
        MARK: cluster.mark,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        **(_metrics_ports() if cluster.metrics else NO_METRICS_PORTS),
        **(tls.variables(Path(cluster.tls)) if cluster.tls else {}),
    }


def _metrics_ports() -> dict[str, str]:
    return {name: str(free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}


def _wait_ready(cluster: LocalCluster) -> None:
    """Until the jobs API answers and all nodes are alive: both come up a little after `ray start` returns."""
    import httpx

    client = httpx.Client(headers={"Authorization": f"Bearer {ensure_token()}"}, timeout=10, trust_env=False)
    give_up = time.monotonic() + _READY_SECONDS
    seen = "no answer"
    with client:
        while time.monotonic() < give_up:
            try:
                jobs = client.get(f"{cluster.jobs_url}/api/jobs/")
                alive = client.get(f"{cluster.jobs_url}/nodes", params={"view": "summary"})
                seen = f"jobs API {jobs.status_code}, nodes {alive.status_code}"
                if jobs.is_success and alive.is_success and _alive(alive.json()) >= cluster.nodes:
                    return
            except httpx.TransportError as error:
                seen = str(error)
            time.sleep(0.2)
    raise RunFailed(f"the cluster was not ready within {_READY_SECONDS} s ({seen}); its logs were in {cluster.folder}")


def _alive(answer: dict) -> int:
    return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])


def _remove(cluster: LocalCluster) -> int:
    ended = end(cluster.members)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    _state(cluster.name).unlink(missing_ok=True)
    return ended


def _refuse_second(name: str) -> None:
    cluster = find(name)
    if cluster is None:
        return
    if cluster.members():
        raise InputError(
            f"local cluster {name!r} is up already, with {cluster.nodes} nodes at {cluster.jobs_url}: "
            "use it, end it with `raylign down`, or give the new one a name and a port of its own"
        )
    _remove(cluster)  # its processes ended without `down`, with the machine for example


def _require_free(port: int) -> None:
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


def _short_folder() -> str:
    """A new folder, open to its owner only, short enough for the 107 bytes that a socket's path may have."""
    root = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="rl-", dir=root if len(root) <= 24 else "/tmp")


def _state(name: str) -> Path:
    return home() / "clusters" / f"{name}.json"


def _save(cluster: LocalCluster) -> None:
    path = _state(cluster.name)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomically(path, json.dumps(asdict(cluster), indent=1))


def _tail(log: Path, lines: int = 3) -> str:
    text = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(text[-lines:]) or "it said nothing"
