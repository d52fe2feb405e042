"""The shape of the repository: packages, import direction, and what must not be imported early."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["cluster", "rollout", "serve", "trainers", "cli"]


def test_every_folder_with_code_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [p.parent.relative_to(ROOT) for folder in ORDER for p in (ROOT / folder).rglob("__init__.py")]
    found = {".".join(("raylign", *folder.parts)) for folder in folders}
    assert set(listed["packages"]) == found | {"raylign"}
    assert set(listed["package-dir"]) == set(listed["packages"])


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    for path in (ROOT / folder).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                target = (node.module or "").split(".")[0]
                assert target in allowed, f"{path.name}:{node.lineno} imports {target}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] not in {*ORDER, "raylign"}, (
                    f"{path.name}:{node.lineno}: relative imports only"
                )


LIGHT = [
    "raylign.cli.main",
    "raylign.cluster.config",
    "raylign.rollout.config",
    "raylign.serve.config",
    "raylign.trainers.config",
    "raylign.trainers.recipe",
    "raylign.trainers.online.advantages",
    "raylign.trainers.schedule",
    "raylign.rollout.ledger",
    "raylign.rollout.rewards.functions",
    "raylign.cluster.placement",
]


@pytest.mark.parametrize("module", LIGHT)
def test_configs_verbs_and_pure_modules_import_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
