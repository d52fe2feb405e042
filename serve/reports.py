"""What every replica says it has of a registry: a file each, which counts while its replica goes on writing it."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..cluster.rundir import write_atomically

LIVE_SECONDS = 15.0
"""A report this old is of a replica that is gone. Nodes' clocks must agree better than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One replica, as it last said."""

    replica: str
    base: str
    """Digest of the base it serves."""
    ready: tuple[str, ...] = ()
    """Models whose content it has read and proven itself."""
    refused: dict[str, str] = field(default_factory=dict)
    """Models that it cannot serve, and why."""
    heard: float = field(default_factory=time.time)
    """Seconds since the epoch."""


def write_report(registry: Path, report: Report) -> None:
    """Replace what this replica said before."""
    write_atomically(_path(registry, report.replica), json.dumps(asdict(report)))


def remove_report(registry: Path, replica: str) -> None:
    """Say that a replica is no more."""
    _path(registry, replica).unlink(missing_ok=True)


def live_reports(registry: Path) -> list[Report]:
    """Of every replica that lives, by name."""
    reports = [report for path in sorted((registry / "replicas").glob("*.json")) if (report := _read(path))]
    return [report for report in reports if time.time() - report.heard < LIVE_SECONDS]


def _read(path: Path) -> Report | None:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:  # it ended just now
        return None
    return Report(**record | {"ready": tuple(record["ready"])})


def _path(registry: Path, replica: str) -> Path:
    return registry / "replicas" / f"{replica}.json"
