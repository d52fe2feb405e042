"""The Python that rollout actors run in: proof, before anything starts, that it is there and has what they need."""

import json
import subprocess
import sys
from pathlib import Path

from ..cluster.errors import InputError
from .config import RolloutConfig

PROBE_SECONDS = 60.0

_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
print(json.dumps({"python": "%d.%d" % sys.version_info[:2]} | {n: version(n) for n in ("ray", "raylign", "vllm")}))
"""


def check_interpreter(rollout: RolloutConfig, where: str) -> None:
    """Raise `InputError` where the actors' Python is missing, or lacks what a rollout with this engine imports.

    `where` is the stage's place in the recipe. Nothing is imported, here or there: vLLM alone would take 10 s.
    """
    ours = _facts(sys.executable, where)
    theirs = _facts(rollout.python, where) if rollout.python else ours
    name = rollout.python or "this environment"
    for package in ("python", "ray"):
        if theirs[package] != ours[package]:
            raise InputError(
                f"{where}.python: {name} has {package} {theirs[package] or 'not at all'}, here it is {ours[package]}; "
                "actors of one cluster need the same"
            )
    if not theirs["raylign"]:
        raise InputError(f"{where}.python: {name} does not have raylign: install it there, with --no-deps")
    if rollout.engine == "vllm" and not theirs["vllm"]:
        raise InputError(
            f"{where}.engine is vllm, which {name} does not have: give {where}.python, the Python of an environment "
            "with vLLM (make test-vllm makes one)"
        )


def _facts(python: str, where: str) -> dict[str, str | None]:
    """Versions of what matters in an environment; none for what it lacks."""
    if not Path(python).is_file():
        raise InputError(f"{where}.python: no Python at {python}")
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=PROBE_SECONDS)
        return json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise InputError(f"{where}.python: {python} does not run as a Python: {last}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{where}.python: {python} does not run as a Python: {error}") from None
