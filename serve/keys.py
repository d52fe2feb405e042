"""API keys: who may ask a service, for which models, and how much. Imports neither ray nor torch.

    keys.json    {"keys": [{"name": …, "sha256": …, "models": […] or null, "requests_per_minute": …, …}]}

Only hashes are kept. A key is 32 random bytes, so one round of SHA-256 is enough: there is nothing to guess.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from pydantic import Field, ValidationError

from ..cluster.config import Config, Name
from ..cluster.errors import InputError, NotFound
from ..cluster.rundir import write_atomically

_PREFIX = "rl-"


class Key(Config):
    """One key, without its secret."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    models: tuple[str, ...] | None = None
    """Aliases and digests it may ask for; none is all."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Of each replica."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Of prompts and completions together, of each replica."""


class KeyFile(Config):
    """What `keys.json` holds."""

    keys: tuple[Key, ...] = ()


def keys_path(registry: Path) -> Path:
    """Where the keys of the services of a registry are."""
    return registry / "keys.json"


class KeyRing:
    """The keys of one file, read again whenever it changes. A file that cannot be read lets nobody in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: tuple[Key, ...] = ()
        self._stamp: tuple[int, ...] | None = None
        self._seen = False
        self._refresh()

    @property
    def required(self) -> bool:
        """Whether a key is needed: from when there first was a file, also after it is gone."""
        self._refresh()
        return self._seen

    def find(self, secret: str) -> Key | None:
        """The key of a secret; takes the same time whichever it is, and where it is none."""
        self._refresh()
        digest = _hash(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        try:
            at = os.stat(self._path)
        except FileNotFoundError:
            self._keys, self._stamp = (), None
            return
        stamp = (at.st_mtime_ns, at.st_size, at.st_ino)
        if stamp == self._stamp:
            return
        self._seen, self._stamp = True, stamp
        try:
            self._keys = read_keys(self._path)
        except InputError:
            self._keys = ()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; none where there is no file. Raises `InputError` for one that is not as it should be."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place or 'the file'}: {first['msg']}") from None


def add_key(
    path: Path,
    name: str,
    *,
    models: tuple[str, ...] | None = None,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
) -> str:
    """Make a key and write its hash; gives the secret, which is kept nowhere.

    Raises `InputError` for a name that is taken or none, or a limit that is no limit.
    """
    keys = read_keys(path)
    if any(key.name == name for key in keys):
        raise InputError(f"{path} has a key {name!r} already: remove it first, or take another name")
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(
            name=name,
            sha256=_hash(secret),
            models=models,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"key {name!r}: {first['loc'][0]}: {first['msg']}") from None
    _write(path, (*keys, key))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Forget a key; services refuse it at once. Raises `NotFound` where there is none of that name."""
    keys = read_keys(path)
    kept = tuple(key for key in keys if key.name != name)
    if len(kept) == len(keys):
        raise NotFound(f"no key {name!r} in {path}: there are {', '.join(key.name for key in keys) or 'none'}")
    _write(path, kept)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, KeyFile(keys=keys).model_dump_json(indent=1))
    path.chmod(0o600)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
