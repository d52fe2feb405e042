"""The image's recipe, as far as it shows without a Docker daemon: what it copies is what the wheel needs."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, re.MULTILINE)
    assert project["requires-python"] == f">={python}"
    (torch,) = re.findall(r"torch==([\d.]+)", DOCKERFILE)
    assert f"torch=={torch}" in (ROOT / "Makefile").read_text()
    (extra,) = re.findall(r"'\.\[(\w+)\]'", DOCKERFILE)
    assert extra in project["optional-dependencies"]


def test_nobody_is_root_in_it_and_no_secret_is_copied() -> None:
    assert DOCKERFILE.index("USER ray") < DOCKERFILE.index("CMD")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "runs", "wandb", ".venv"} <= set(ignored)


def test_what_is_copied_makes_a_wheel_with_every_package(tmp_path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        if any(name == p or name.startswith(f"{p}/") or fnmatch(name, p) for p in ignored):
            continue
        to = tmp_path / "image" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tmp_path / "image")], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        assert f"{package.replace('.', '/')}/__init__.py" in held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]
