"""Manifests as YAML, and to a Kubernetes cluster by its own command."""

import json
import subprocess
from collections.abc import Sequence
from shutil import which
from typing import Any

from ..errors import ClusterUnreachable, InputError

_APPLY_SECONDS = 60


def as_yaml(manifests: Sequence[dict[str, Any]]) -> str:
    """One YAML text of all of them; texts of several lines stand as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    plain = json.loads(json.dumps(list(manifests)))  # an object that stands twice is no alias
    return "---\n".join(yaml.dump(m, Dumper=Dumper, sort_keys=False, width=120) for m in plain)


def apply(manifests: Sequence[dict[str, Any]]) -> str:
    """Give them to `kubectl apply`; what it said. Raises `InputError` where there is none, `ClusterUnreachable`."""
    command = which("kubectl")
    if command is None:
        raise InputError("kubectl is not installed here: add --print, and apply the file where it is")
    try:
        done = subprocess.run(
            [command, "apply", "-f", "-"],
            input=as_yaml(manifests),
            capture_output=True,
            text=True,
            timeout=_APPLY_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(f"kubectl apply did not end within {_APPLY_SECONDS} s") from None
    if done.returncode:
        raise ClusterUnreachable(f"kubectl apply: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return done.stdout.strip()
