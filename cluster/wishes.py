"""What is asked of a run (`desired.json`) is signed with its cluster's token (HMAC-SHA256, RFC 2104).

So whoever may write to a run's storage, but has no token, cannot stop or scale it. Where no token is asked for there is
nothing to sign with, and every wish counts.
"""

import hmac
import json
import os
from collections.abc import Mapping
from typing import Any

from .auth import MODE, read_token

SIGNATURE = "signature"
"""The key of `desired.json` that holds it."""


def key() -> str | None:
    """The token that this process signs and checks with, or none where no token is asked for."""
    return read_token() if os.environ.get(MODE, "token").lower() == "token" else None


def signed(run: str, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Wishes with the signature that holds for the run of that name alone."""
    token = key()
    return {**wishes, **({SIGNATURE: _mac(token, run, wishes)} if token else {})}


def valid(run: str, written: Mapping[str, Any]) -> bool:
    """Whether what `desired.json` says comes from someone with this process's token."""
    token, wishes = key(), without_signature(written)
    given = str(written.get(SIGNATURE, "")).encode(errors="replace")  # of bytes it may be any; of text ASCII alone
    return token is None or hmac.compare_digest(given, _mac(token, run, wishes).encode())


def without_signature(written: Mapping[str, Any]) -> dict[str, Any]:
    """The wishes themselves."""
    return {name: value for name, value in written.items() if name != SIGNATURE}


def proof(run: str) -> str | None:
    """By which a command knows, before it asks, whether it has the token of the run's cluster; none without one."""
    token = key()
    return _mac(token, run, {"proof": True}) if token else None


def _mac(token: str, run: str, wishes: Mapping[str, Any]) -> str:
    text = json.dumps([run, wishes], sort_keys=True, separators=(",", ":"))
    return hmac.new(token.encode(), text.encode(), "sha256").hexdigest()
