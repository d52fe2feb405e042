"""The adapter registry: which models there are, by digest, and which names point at them.

    <storage>/registry/entries/<digest>.json    one immutable model: an adapter or a base
    <storage>/registry/aliases/<name>.json      a name, the digest it points at, and where it pointed before
    <storage>/registry/service.json             the service that answers for this registry, while one runs

Every write replaces a whole file; changes of an alias are serialised by a lock, so writers on one machine cannot lose
each other's. Readers need no lock.
"""

import fcntl
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..cluster.config import NAME_PATTERN
from ..cluster.errors import InputError, NotFound
from ..cluster.rundir import write_atomically
from ..cluster.weights import Tensors, base_digest
from .verify import read_adapter, recorded_base

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORTEST_PREFIX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model that can be served; what a digest stands for never changes."""

    digest: str
    kind: Literal["adapter", "base"]
    path: str
    base: str
    """Digest of the base an adapter sits on; a base's own."""
    base_path: str
    state: Literal["verified"] = "verified"
    created: float
    """Seconds since the epoch."""
    provenance: dict[str, Any] = field(default_factory=dict)


class Registry:
    """The registry below one folder; several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def register_base(self, folder: Path, provenance: dict[str, Any] | None = None) -> Entry:
        """Register a model folder under its digest. Raises `InputError` where it cannot be served."""
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is not a model folder: it has no config.json")
        digest = base_digest(folder)
        path = str(folder.resolve())
        return self._add(
            Entry(
                digest=digest,
                kind="base",
                path=path,
                base=digest,
                base_path=path,
                created=time.time(),
                provenance=provenance or {},
            )
        )

    def publish(self, folder: Path, base: Entry, provenance: dict[str, Any] | None = None) -> Entry:
        """Register an adapter folder, `…/<digest>`, that is to be served on `base`.

        The folder is proven first: safetensors only, readable, finite, made for this base, and its content is what its
        name says. Raises `InputError` otherwise, and registers nothing.
        """
        recorded = recorded_base(folder)
        if recorded not in (None, base.digest):
            raise InputError(
                f"adapter {folder} was made for base {recorded[:12]}, not for {base.digest[:12]} ({base.path}): "
                "register it with its own base"
            )
        read_adapter(folder, folder.name, base.digest)
        return self._add(
            Entry(
                digest=folder.name,
                kind="adapter",
                path=str(folder.resolve()),
                base=base.digest,
                base_path=base.path,
                created=time.time(),
                provenance=provenance or {},
            )
        )

    def promote(self, alias: str, digest: str) -> Entry:
        """Point a name at a registered model. Raises `InputError` for a bad name, `NotFound` for an unknown digest."""
        if not re.fullmatch(NAME_PATTERN, alias):
            raise InputError(f"alias {alias!r} must match {NAME_PATTERN}")
        if _DIGEST.fullmatch(alias):
            raise InputError(f"alias {alias!r} looks like a digest: take another name")
        entry = self._entry(digest)
        with self._locked():
            path = self._alias_path(alias)
            history = json.loads(path.read_text())["history"] if path.exists() else []
            if not history or history[-1]["digest"] != entry.digest:
                history.append({"digest": entry.digest, "since": time.time()})
            write_atomically(path, json.dumps({"name": alias, "digest": entry.digest, "history": history}, indent=1))
        return entry

    def resolve(self, name: str) -> Entry:
        """The entry an alias, a digest or a unique start of one (8 digits or more) stands for.

        Raises `NotFound` with what there is, `InputError` where several digests begin so.
        """
        if re.fullmatch(NAME_PATTERN, name) and self._alias_path(name).exists():
            return self._entry(json.loads(self._alias_path(name).read_text())["digest"])
        if _DIGEST.fullmatch(name):
            return self._entry(name)
        if re.fullmatch(f"[0-9a-f]{{{_SHORTEST_PREFIX},63}}", name):
            found = sorted((self.root / "entries").glob(f"{name}*.json"))
            if len(found) > 1:
                raise InputError(f"{name!r} is the start of {len(found)} digests: give more of it")
            if found:
                return self._entry(found[0].stem)
        raise self._unknown(name)

    def entries(self) -> list[Entry]:
        """Every registered model, oldest first."""
        found = [_read(path) for path in (self.root / "entries").glob("*.json")]
        return sorted(found, key=lambda entry: (entry.created, entry.digest))

    def aliases(self) -> dict[str, str]:
        """Every name and the digest it points at, by name."""
        paths = sorted((self.root / "aliases").glob("*.json"))
        return {path.stem: json.loads(path.read_text())["digest"] for path in paths}

    def history(self, alias: str) -> list[dict[str, Any]]:
        """Where a name has pointed: `digest` and `since` (seconds since the epoch), oldest first."""
        path = self._alias_path(alias)
        if not (re.fullmatch(NAME_PATTERN, alias) and path.exists()):
            raise self._unknown(alias)
        return json.loads(path.read_text())["history"]

    def read_adapter(self, entry: Entry) -> tuple[Tensors, dict[str, Any]]:
        """An adapter's tensors and PEFT config, proven again as they are read: the folder may have changed since."""
        return read_adapter(Path(entry.path), entry.digest, entry.base)

    def _alias_path(self, alias: str) -> Path:
        return self.root / "aliases" / f"{alias}.json"

    def _entry(self, digest: str) -> Entry:
        path = self.root / "entries" / f"{digest}.json"
        if not (_DIGEST.fullmatch(digest) and path.exists()):
            raise self._unknown(digest)
        return _read(path)

    def _add(self, entry: Entry) -> Entry:
        path = self.root / "entries" / f"{entry.digest}.json"
        with self._locked():
            if path.exists():
                first = _read(path)
                if Path(first.path).is_dir():
                    return first
            write_atomically(path, json.dumps(asdict(entry), indent=1))
        return entry

    def _unknown(self, name: str) -> NotFound:
        known = [*self.aliases(), *(entry.digest[:12] for entry in self.entries())]
        there = f"there are {', '.join(known)}" if known else "it is empty"
        return NotFound(f"no model {name!r} in the registry {self.root}: {there}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> Entry:
    return Entry(**json.loads(path.read_text()))
