"""The adapter registry: which models there are, by digest, and which names point at them.

    <storage>/registry/entries/<digest>.json    one immutable model: an adapter or a base
    <storage>/registry/verified/<digest>.json   that its content was proven to be what its digest says
    <storage>/registry/retired/<digest>.json    that it is to be served no more
    <storage>/registry/aliases/<name>.json      a name, what it points at, and where it pointed before
    <storage>/registry/replicas/<id>.json       what a replica has of all this (`reconcile.py`)
    <storage>/registry/service.json             the service that answers for this registry, while one runs

It says what is wanted; replicas make it so. Every write replaces a whole file; writers take turns by a lock of the file
system, so none loses another's change. Readers need no lock.
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
from .aliases import Alias, Move
from .reports import live_reports
from .verify import read_adapter, recorded_base

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORTEST_PREFIX = 8

State = Literal["registered", "verified", "ready", "retired"]
"""Of an entry: written down; its content proven; proven by every replica too; no longer served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model that can be served; what a digest stands for never changes."""

    digest: str
    kind: Literal["adapter", "base"]
    path: str
    base: str
    """Digest of the base an adapter sits on; a base's own."""
    base_path: str
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
        return self._add_proven(
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
        return self._add_proven(
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

    def check_name(self, alias: str) -> None:
        """Raise `InputError` for a name that cannot be given: another's but for capitals, or one like a digest."""
        if not re.fullmatch(NAME_PATTERN, alias):
            raise InputError(f"alias {alias[:80]!r} must match {NAME_PATTERN}")
        if _DIGEST.fullmatch(alias):
            raise InputError(f"alias {alias!r} looks like a digest: take another name")
        near = [name for name in self._names() if name.lower() == alias.lower() and name != alias]
        if near:
            raise InputError(f"alias {alias!r} differs from {near[0]!r} in capitals only: take that or another")

    def promote(self, alias: str, digest: str, *, why: str = "", evaluation: dict[str, Any] | None = None) -> Entry:
        """Point a name at a model. Raises `InputError` for a bad name, `NotFound` for an unknown or retired digest."""
        self.split(alias, {digest: 1.0}, why=why, evaluation=evaluation)
        return self._entry(digest)

    def split(
        self, alias: str, weights: dict[str, float], *, why: str = "", evaluation: dict[str, Any] | None = None
    ) -> Alias:
        """Point a name at several models of one base, each for a part of its users; the parts add up to 1.

        Raises `InputError` for a bad name or models of several bases, `NotFound` for a digest unknown or retired.
        """
        self.check_name(alias)
        with self._locked():
            bases = {self._servable(digest).base for digest in weights}
            if len(bases) > 1:
                raise InputError(f"alias {alias!r} cannot be split over {len(bases)} bases: a service has one")
            move = Move(weights=weights, since=time.time(), why=why, evaluation=evaluation or {})
            path = self._alias_path(alias)
            moved = self._read_alias(path).moved(move) if path.exists() else Alias(name=alias, moves=(move,))
            self._write_alias(moved)
        return moved

    def rollback(self, alias: str, *, why: str = "", only_from: str | None = None) -> Alias:
        """Point a name back where it pointed before; with `only_from` just where that digest still has users.

        Raises `NotFound` for an unknown name, `InputError` where there is nothing before.
        """
        with self._locked():
            now = self.alias(alias)
            if only_from is not None and only_from not in now.now.weights:
                return now
            back = now.rolled_back(time.time(), why)
            for digest in back.now.weights:
                self._servable(digest)
            self._write_alias(back)
        return back

    def retire(self, digest: str) -> Entry:
        """Serve a model no more; requests in flight keep it. Raises `InputError` while a name points at it."""
        entry = self._entry(digest)
        with self._locked():
            names = [name for name in self.aliases() if digest in self.alias(name).now.weights]
            if names:
                raise InputError(f"model {digest[:12]} is what {', '.join(names)} points at: promote another first")
            self._mark("retired", digest)
        return entry

    def state(self, digest: str) -> State:
        """How far a registered model has come. Raises `NotFound` for an unknown digest."""
        entry = self._entry(digest)
        if self.is_retired(digest):
            return "retired"
        if not self._marked("verified", digest):
            return "registered"
        reports = [report for report in live_reports(self.root) if report.base == entry.base]
        return "ready" if reports and all(digest in report.ready for report in reports) else "verified"

    def is_retired(self, digest: str) -> bool:
        """Whether a model is to be served no more."""
        return self._marked("retired", digest)

    def resolve(self, name: str, user: str | None = None) -> Entry:
        """The entry an alias, a digest or a unique start of one (8 digits or more) stands for.

        Of a split alias `user` always gets the same model.

        Raises `NotFound` with what there is, also for a retired model; `InputError` where several digests begin so.
        """
        return self._servable(self._digest_of(name, user))

    def find(self, name: str) -> Entry:
        """As `resolve`, retired models included."""
        return self._entry(self._digest_of(name, None))

    def _digest_of(self, name: str, user: str | None) -> str:
        if re.fullmatch(NAME_PATTERN, name) and self._alias_path(name).exists():
            return self._read_alias(self._alias_path(name)).pick(user)
        if _DIGEST.fullmatch(name):
            return name
        if re.fullmatch(f"[0-9a-f]{{{_SHORTEST_PREFIX},63}}", name):
            found = sorted((self.root / "entries").glob(f"{name}*.json"))
            if len(found) > 1:
                raise InputError(f"{name!r} is the start of {len(found)} digests: give more of it")
            if found:
                return found[0].stem
        raise self._unknown(name)

    def entries(self) -> list[Entry]:
        """Every registered model, retired ones included, oldest first."""
        found = [_read(path) for path in (self.root / "entries").glob("*.json")]
        return sorted(found, key=lambda entry: (entry.created, entry.digest))

    def aliases(self) -> dict[str, str]:
        """Every name and the digest that most of its users get, by name."""
        return {path.stem: self._read_alias(path).digest for path in sorted((self.root / "aliases").glob("*.json"))}

    def alias(self, name: str) -> Alias:
        """A name and its moves. Raises `NotFound` for an unknown one."""
        if not (re.fullmatch(NAME_PATTERN, name) and self._alias_path(name).exists()):
            raise self._unknown(name)
        return self._read_alias(self._alias_path(name))

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

    def _add_proven(self, entry: Entry) -> Entry:
        """The first entry of a digest stays, unless its folder is gone."""
        path = self.root / "entries" / f"{entry.digest}.json"
        with self._locked():
            if not path.exists() or not Path(_read(path).path).is_dir():
                write_atomically(path, json.dumps(asdict(entry), indent=1))
            self._mark("verified", entry.digest)
            return _read(path)

    def _mark(self, state: str, digest: str) -> None:
        path = self.root / state / f"{digest}.json"
        if not path.exists():
            write_atomically(path, json.dumps({"since": time.time()}))

    def _marked(self, state: str, digest: str) -> bool:
        return (self.root / state / f"{digest}.json").exists()

    def _servable(self, digest: str) -> Entry:
        entry = self._entry(digest)
        if self.is_retired(digest):
            raise NotFound(f"model {digest[:12]} in the registry {self.root} is retired: it is served no more")
        return entry

    def _names(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "aliases").glob("*.json"))

    def _read_alias(self, path: Path) -> Alias:
        return Alias.of_json(json.loads(path.read_text()))

    def _write_alias(self, alias: Alias) -> None:
        write_atomically(self._alias_path(alias.name), json.dumps(alias.as_json(), indent=1))

    def _unknown(self, name: str) -> NotFound:
        known = [*self._names(), *(entry.digest[:12] for entry in self.entries())]
        there = f"there are {', '.join(known)}" if known else "it is empty"
        return NotFound(f"no model {name[:80]!r} in the registry {self.root}: {there}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> Entry:
    return Entry(**json.loads(path.read_text()))
