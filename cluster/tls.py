"""Certificates for Ray's gRPC: a small authority of the cluster's own, and one pair that its nodes and drivers share.

Both sides of every connection show the pair and check it against the authority, so whoever has no copy is no peer. Ray
reads four variables for it, in every process that joins (docs.ray.io, "TLS Authentication"): see `variables`.
"""

import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ClusterUnreachable

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_DAYS = 365
_PROBE_SECONDS = 5.0
_AUTHORITY, _PAIR, _KEY = "ca.pem", "node.pem", "node.key"


def make(folder: Path, hosts: Sequence[str]) -> None:
    """Write `ca.pem`, `node.pem` and `node.key` (mode 0600), valid for these addresses and names, for a year.

    The authority's own key is not kept: nobody can add to the cluster's peers later. New addresses need new files.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "raylign cluster")])

    def certificate(name: x509.Name, of: ec.EllipticCurvePrivateKey, *, signs: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority)
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks of nodes differ
            .not_valid_after(now + datetime.timedelta(days=_DAYS))
            .add_extension(x509.BasicConstraints(ca=signs, path_length=None), critical=True)
        )

    root = certificate(authority, authority_key, signs=True).sign(authority_key, hashes.SHA256())
    node = (
        certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "raylign node")]), key, signs=False)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder / _AUTHORITY, _pem(root))
    _write(folder / _PAIR, _pem(node))
    _write(folder / _KEY, _private(key))


def variables(folder: Path) -> dict[str, str]:
    """What the environment of every process that joins the cluster says."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / _PAIR),
        "RAY_TLS_SERVER_KEY": str(folder / _KEY),
        "RAY_TLS_CA_CERT": str(folder / _AUTHORITY),
    }


def require_same(host: str, port: int) -> None:
    """Raise `ClusterUnreachable` where a cluster speaks TLS and this process does not, or the other way round.

    Ray itself waits for 40 seconds and says that nobody answers.
    """
    ours, theirs = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"), _speaks_tls(host, port)
    if theirs and not ours:
        raise ClusterUnreachable(
            f"the cluster at {host}:{port} speaks TLS: set {', '.join(variables(Path()))}; "
            "`raylign up --tls` printed them, and its files are on the cluster's nodes"
        )
    if ours and not theirs:
        raise ClusterUnreachable(f"the cluster at {host}:{port} does not speak TLS, and RAY_USE_TLS is set: unset it")


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whether it is TLS, not whose
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it understood, and refuses a peer without a certificate
    except OSError:
        return False


def _name(host: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private(key: "ec.EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
