"""The token that a Ray cluster asks for.

Whoever reaches Ray's ports runs code, so clusters here ask for a token. Ray looks for it in `RAY_AUTH_TOKEN`, then in
the file `RAY_AUTH_TOKEN_PATH`, then in `~/.ray/auth_token`; this module makes that file when there is none, readable by
its owner only (Ray itself writes it with mode 0644). Ray's own commands find it too once `RAY_AUTH_MODE=token` is set.
"""

import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path

from .errors import InputError

MODE = "RAY_AUTH_MODE"


def token_file() -> Path:
    """The file that Ray reads the token from."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read_token() -> str | None:
    """The token of this user, or none. A file that others may read is closed to them first."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = token_file()
    if not path.is_file():
        return None
    try:
        _close_to_others(path)
        return path.read_text().strip() or None
    except OSError as error:
        raise InputError(f"the token file {path} cannot be used: {error.strerror}") from None


def ensure_token() -> str:
    """The token of this user, made if there is none."""
    return read_token() or _make(token_file())


def ask_for_token(*, make: bool) -> bool:
    """Switch token mode on in this process and its children; says whether it is on.

    An explicit `RAY_AUTH_MODE` is respected. Without one it is switched on where a token exists; `make` makes one.
    """
    asked = os.environ.get(MODE)
    on = asked.lower() == "token" if asked else make or read_token() is not None
    if on:
        if make:
            ensure_token()
        os.environ[MODE] = "token"
        refresh_ray()
    return on


def refresh_ray() -> None:
    """Have Ray read its settings from the environment again, if it was imported before they were made."""
    if "ray._raylet" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _close_to_others(path: Path) -> None:
    info = path.stat()
    if info.st_uid == os.getuid() and stat.S_IMODE(info.st_mode) & 0o077:
        path.chmod(0o600)


def _make(path: Path) -> str:
    """Write a new token; of two processes that do so at once, both return the one that came first."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".token-")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first
    finally:
        os.unlink(draft)
    token = path.read_text().strip()
    if not token:
        raise InputError(f"the token file {path} is empty: remove it")
    return token
