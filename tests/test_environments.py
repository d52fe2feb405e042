"""The two environments agree where they must: actors of one run may come from both."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _pins(name: str) -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {re.sub(r"[-_.]+", "-", package).lower(): version.strip() for package, version in lines}


def test_the_environment_with_vllm_has_all_that_the_toolkit_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[A-Za-z0-9_.-]+", text)[0].replace("_", "-").lower() for text in project["dependencies"]}  # type: ignore[index]
    assert needed - _pins("constraints-vllm.txt").keys() == {"torch"}, "torch is installed by the Makefile"


def test_both_environments_have_one_ray_and_one_safetensors() -> None:
    """Ray refuses a worker of another version; weights and records cross between the environments."""
    ours, vllm = _pins("constraints.txt"), _pins("constraints-vllm.txt")
    for package in ("ray", "safetensors", "peft", "pydantic"):
        assert ours[package] == vllm[package], package
