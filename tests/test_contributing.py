"""CONTRIBUTING.md shows how to add things; its code runs, and what it names exists."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))


ALGORITHM = "Add an algorithm"


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != ALGORITHM])
def test_its_code_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"CONTRIBUTING.md {section}", "exec"), {"__name__": "contributing"})


def test_an_algorithm_is_two_functions_and_a_line(tmp_path: Path) -> None:
    """The section's blocks, put where it says in a copy of the package; its test runs there."""
    package = tmp_path / "raylign"
    for folder in ("cluster", "rollout", "serve", "trainers"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", package)
    advantage, objective, line, test = re.findall(r"```\w+\n(.*?)```", SECTIONS[ALGORITHM], re.S)
    for file, code in (("advantages", advantage), ("objectives", objective)):
        with (package / "trainers/online" / f"{file}.py").open("a") as text:
            text.write(f"\n\n{code}")
    registry = package / "trainers/stages/algorithms.py"
    head, begin, rest = registry.read_text().partition("ALGORITHMS: dict[str, Algorithm] = {\n")
    registry.write_text(f"{head}{begin}    {line}{rest}")
    here = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", test], env=here, cwd=tmp_path, check=True, timeout=120)


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trainers.stages", "ALGORITHMS"),
        ("trainers.data.rows", "_KIND_OF_STAGE"),
        ("trainers.data.proof", "_encode"),
        ("rollout.rewards.functions", "_function"),
        ("rollout.config", "TextReward"),
        ("rollout.rewards.scorer", "GroupReward"),
        ("rollout.engines", "ENGINES"),
        ("trainers.stages", "StageConfig"),
    ],
)
def test_the_names_it_sends_you_to_exist(module: str, name: str) -> None:
    assert name in TEXT
    assert hasattr(importlib.import_module(f"raylign.{module}"), name)
