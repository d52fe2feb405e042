"""A cluster that speaks TLS: nodes and jobs do, and who has no certificate is no peer."""

import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylign.cluster import tls
from raylign.cluster.errors import ClusterUnreachable
from raylign.cluster.jobs import Jobs
from raylign.cluster.local import LocalCluster, down, up

from .commands import free_port


def answers(cluster: LocalCluster, *, shows: bool) -> bool:
    """Whether the control store speaks HTTP/2 to a client that trusts its authority, with a certificate or without."""
    folder, (host, port) = Path(cluster.tls), cluster.address.split(":")
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    if shows:
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    try:
        plain = socket.create_connection((host, int(port)), timeout=10)
        with plain, context.wrap_socket(plain, server_hostname=host) as secure:
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            frame = secure.recv(9)
    except ssl.SSLError as error:
        if "CERTIFICATE_REQUIRED" not in (error.reason or ""):
            raise
        return False
    return len(frame) == 9 and frame[3] == 4  # SETTINGS


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[LocalCluster]:
    started = up(2, cpus_per_node=2, port=free_port(), name="tls", encrypted=True)
    yield started
    down("tls")


pytestmark = pytest.mark.multinode

HOSTS = """
import ray
ray.init(log_to_driver=False)
here = ray.remote(num_cpus=2, scheduling_strategy="SPREAD")(ray.util.get_node_ip_address)
print("hosts", sorted(ray.get([here.remote(), here.remote()])))
"""


def test_keys_are_their_owners_and_hold_for_the_nodes_alone(tmp_path: Path) -> None:
    tls.make(tmp_path / "tls", ["10.0.0.5", "head.example"])
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == ["ca.pem", "node.key", "node.pem"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tls").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    from cryptography import x509

    certificate, authority = (
        x509.load_pem_x509_certificate((tmp_path / "tls" / n).read_bytes()) for n in ("node.pem", "ca.pem")
    )
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["10.0.0.5", "head.example"]


def test_nodes_speak_tls_to_who_shows_a_certificate_alone(cluster: LocalCluster) -> None:
    assert answers(cluster, shows=True)
    assert not answers(cluster, shows=False)


def test_a_job_and_a_driver_with_the_variables_use_all_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "hosts.py").write_text(HOSTS)
    jobs = Jobs(cluster.jobs_url)
    job, _ = jobs.submit("hosts", "python hosts.py", working_dir=tmp_path / "job")
    said: list[str] = []
    assert jobs.follow(job.submission_id, said.append).status == "succeeded"
    assert "hosts ['127.0.0.2', '127.0.0.3']" in "".join(said)
    done = _driver(cluster, tls.variables(Path(cluster.tls)))
    assert "2 nodes" in done.stdout, done.stderr


def test_a_driver_without_them_is_told_at_once(cluster: LocalCluster) -> None:
    done = _driver(cluster, {})
    assert "speaks TLS: set RAY_USE_TLS, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY, RAY_TLS_CA_CERT" in done.stderr


def test_variables_for_a_cluster_without_tls_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: server.accept()[0].sendall(b"no TLS here"), daemon=True).start()
        with pytest.raises(ClusterUnreachable, match="does not speak TLS, and RAY_USE_TLS is set"):
            tls.require_same("127.0.0.1", port)


def _driver(cluster: LocalCluster, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = (
        "from raylign.cluster.config import ClusterConfig\n"
        "from raylign.cluster.session import connect, probe\n"
        f"probe({cluster.address!r})\n"
        f"with connect(ClusterConfig(address={cluster.address!r})):\n"
        "    import ray\n"
        "    print(len(ray.nodes()), 'nodes')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
