"""Which addresses a reward may ask: public ones, unless the recipe allows others. Names are resolved here and the
connection goes to the address that was looked at, so that a name cannot mean another one a moment later."""

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

from .functions import RewardError


class Refused(RewardError):
    """An address that the recipe does not allow."""


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; an IPv4 one in an IPv6 one counts as what it holds."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
        if isinstance(ip, ipaddress.IPv6Address) and ip in ipaddress.ip_network("64:ff9b::/96"):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast


async def resolve(url: str, *, allow_private: bool) -> str:
    """One address of a URL's host. Raises `Refused` where any is private and the recipe does not allow it, `OSError`
    where the name is unknown."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"was sent to {url!r:.80}, which is no http address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    found = [str(entry[4][0]) for entry in await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    if not allow_private and (private := [address for address in found if not is_public(address)]):
        raise Refused(f"asks {parts.hostname}, which is {private[0]}, no public address; allow_private: true allows it")
    return found[0]
