"""CONTRIBUTING.md shows how to add things; its code runs, and what it names exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))


@pytest.mark.parametrize("section", SECTIONS)
def test_its_code_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"CONTRIBUTING.md {section}", "exec"), {"__name__": "contributing"})


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trainers.online.losses", "OBJECTIVES"),
        ("trainers.data.rows", "_KIND_OF_STAGE"),
        ("trainers.data.proof", "_encode"),
        ("rollout.rewards.functions", "_function"),
        ("rollout.config", "RewardConfig"),
        ("rollout.engines", "ENGINES"),
        ("trainers.stages", "StageConfig"),
    ],
)
def test_the_names_it_sends_you_to_exist(module: str, name: str) -> None:
    assert name in TEXT
    assert hasattr(importlib.import_module(f"raylign.{module}"), name)
