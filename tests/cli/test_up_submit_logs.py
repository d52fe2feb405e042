"""The verbs up, down, submit and logs where no cluster is up, as a user's shell sees them."""

import subprocess
import sys
from pathlib import Path

import pytest
from raylign.cluster.rundir import RunDir

RECIPE = """\
name: mine
model: {path: MODEL}
stages:
  - type: sft
    data: {path: rows.jsonl}
"""


def raylign(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raylign.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("MODEL", "../models/base"))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "here")
    run.path.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    return run


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["up"], 2, "add --local"),
        (["down", "--name", "nobody"], 4, "no local cluster 'nobody' is up"),
        (["submit", "recipes/nine.yaml"], 2, "did you mean mine.yaml?"),
        (["submit", "recipes/mine.yaml", "--name", "a/b"], 2, "name"),
        (["submit", "recipes/mine.yaml", "--address", "http://127.0.0.1:1"], 5, "no Ray cluster answers"),
        (["submit", "recipes/mine.yaml", "--address", "127.0.0.1:1"], 2, "http://HOST:PORT"),
        (["submit", "recipes/mine.yaml", "--address", "http://192.0.2.1:1"], 2, "give --storage"),
        (
            ["submit", "recipes/mine.yaml", "--address", "http://192.0.2.1:1", "--storage", "/shared"],
            2,
            "model.path is '../models/base', outside the folder that is sent",
        ),
        (["submit", "recipes/mine.yaml", "--wheel", "none.whl"], 2, "no wheel at none.whl"),
        (["logs", "nobody"], 4, "no run 'nobody'"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(
    recipe: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = raylign(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_log_of_a_run_here(run: RunDir, tmp_path: Path) -> None:
    (run / "run.log").write_text("one\ntwo\nthree\n")
    assert raylign("logs", "here", cwd=tmp_path).stdout == "one\ntwo\nthree\n"
    assert raylign("logs", "here", "--tail", "1", cwd=tmp_path).stdout == "three\n"


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("running", 1)])
def test_following_ends_with_the_run(run: RunDir, tmp_path: Path, status: str, code: int) -> None:
    """A run that says it is running while no process holds it is lost, and is not waited for."""
    (run / "run.log").write_text("one\n")
    run.update_status(status=status)
    done = raylign("logs", "here", "-f", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "one\n")


def test_following_goes_on_while_a_process_holds_the_run(run: RunDir, tmp_path: Path) -> None:
    (run / "run.log").write_text("one\n")
    command = [sys.executable, "-m", "raylign.cli", "logs", "here", "-f"]
    with run.hold():
        run.update_status(status="running")
        following = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert following.stdout
        assert following.stdout.readline() == "one\n"
        with (run / "run.log").open("a") as log:
            log.write("two\n")
        assert following.stdout.readline() == "two\n"
        assert following.poll() is None
        run.update_status(status="succeeded")
        assert following.wait(timeout=30) == 0
