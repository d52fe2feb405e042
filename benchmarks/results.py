"""The result files: `results/<name>.json`, written whole or not at all, cases merged by name."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "ray", "numpy")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": _gpu_name(),
    }


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Python, those of the packages that this environment has, and the commit of the code."""
    found = {name: metadata.version(name) for name in _PACKAGES if find_spec(name)}
    return {"python": platform.python_version(), **found, "raylign": _commit()}


def _commit() -> str:
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return shown.stdout.strip() or metadata.version("raylign")


def read(path: Path) -> dict[str, Any]:
    """A result file, or nothing measured yet."""
    return json.loads(path.read_text()) if path.exists() else {"cases": []}


def merged(old: dict[str, Any], name: str, facts: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The file's content with a newly measured case; each case keeps the date and versions it was measured with.

    `facts` has `machine`, `versions` and `date`. Cases of another machine are dropped: they cannot stand in one table.
    """
    same = old.get("machine", facts["machine"]) == facts["machine"]
    kept = [c for c in old["cases"] if c["case"] != case["case"]] if same else []
    if not same:
        print(f"{name}: dropping {len(old['cases'])} cases that were measured on another machine", file=sys.stderr)
    entry = {**case, "date": facts["date"], "versions": facts["versions"]}
    return {"name": name, **facts, "cases": sorted([*kept, entry], key=lambda c: c["case"])}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
