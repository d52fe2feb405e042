"""The run directory: what is written whole, what survives a torn write, and one owner at a time."""

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError, NotFound
from raylign.cluster.rundir import RunDir, write_atomically


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "recipe.yaml").write_text("name: one")
    return RunDir.find(tmp_path, "one")


def test_an_unknown_run_names_those_there_are(run: RunDir) -> None:
    with pytest.raises(NotFound, match="there are one"):
        RunDir.find(run.path.parent, "two")


def test_desired_and_status_merge(run: RunDir) -> None:
    assert run.desired() == {}
    run.desire(rollout=4)
    run.desire(stop=True)
    assert run.desired() == {"rollout": 4, "stop": True}
    run.update_status(step=1)
    run.update_status(stage="grpo")
    assert {k: run.status()[k] for k in ("step", "stage")} == {"step": 1, "stage": "grpo"}


def test_a_torn_last_line_is_left_out_and_a_repeated_step_counts_once(run: RunDir) -> None:
    run.metrics("grpo", 1, {"loss": 1.0})
    run.metrics("grpo", 2, {"loss": 2.0})
    run.metrics("grpo", 2, {"loss": 3.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    assert [(m["step"], m["loss"]) for m in run.all_metrics()] == [(1, 1.0), (2, 3.0)]


def test_writers_in_many_threads_lose_no_event(run: RunDir) -> None:
    threads = [threading.Thread(target=lambda n=n: [run.event("e", n=n) for _ in range(50)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.events("e")) == 200


def test_an_atomic_write_that_fails_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 5)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_one_process_holds_a_run(run: RunDir) -> None:
    assert not run.held()
    with run.hold():
        assert run.held()
        with pytest.raises(InputError, match="running already"), RunDir(run.path).hold():
            pass
    assert not run.held()


def test_a_line_that_was_torn_before_the_run_went_on_is_left_out(run: RunDir) -> None:
    run.metrics("grpo", 1, {"loss": 1.0})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "grpo", "st\xff')
    run.metrics("grpo", 2, {"loss": 2.0})
    run.metrics("grpo", 3, {"loss": 3.0})
    assert [m["step"] for m in run.all_metrics()] == [1, 2, 3]


@pytest.mark.parametrize("file", ["status.json", "desired.json", "summary.json"])
def test_a_damaged_file_is_named_with_the_mend(run: RunDir, file: str) -> None:
    (run / file).write_text('{"status": "runn')
    read = {"status.json": run.status, "desired.json": run.desired, "summary.json": run.summary}[file]
    with pytest.raises(InputError, match=rf"{file} is damaged .* remove it and resume the run"):
        read()


def test_two_processes_that_ask_at_once_lose_nothing(run: RunDir) -> None:
    """Each asks with keys of its own, a hundred times; a read-modify-write without a lock loses some."""
    code = (
        "import sys; from pathlib import Path; from raylign.cluster.rundir import RunDir\n"
        "run = RunDir(Path(sys.argv[1]))\n"
        "for n in range(100): run.desire(**{f'{sys.argv[2]}{n}': n})"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    for process in [subprocess.Popen([*command, name]) for name in ("a", "b")]:
        assert process.wait(timeout=60) == 0
    assert len(run.desired()) == 200


def test_since_is_when_the_state_began(run: RunDir) -> None:
    run.update_status(status="running", step=1)
    since = run.status()["since"]
    run.update_status(status="running", step=2)
    assert run.status()["since"] == since < run.status()["updated"]
    run.update_status(status="stopped")
    assert run.status()["since"] > since


def test_a_run_is_held_although_somebody_asks_whether_it_is(run: RunDir) -> None:
    with (run / ".lock").open("w") as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)
        free = threading.Timer(0.1, lambda: fcntl.flock(asked, fcntl.LOCK_UN))
        free.start()
        with run.hold():
            pass
        free.join()


def test_only_a_directory_of_this_process_without_training_is_discarded(run: RunDir) -> None:
    assert not run.discard()
    run.created = True
    (run / "checkpoints").mkdir()
    assert not run.discard()
    (run / "checkpoints").rmdir()
    assert run.discard()
    assert not run.path.exists()


def test_attempts_are_the_starts_of_a_run_and_how_each_ended(run: RunDir) -> None:
    run.event("run_began", seed=1)
    run.event("controller_lost", reason="it was ended by SIGKILL")
    run.event("run_began", seed=1, again=True)
    run.event("run_ended", status="stopped", reason="asked to stop")
    run.event("run_began", seed=1)
    first, second = run.attempts()
    assert (first["status"], first["reason"], first["restarts"]) == ("stopped", "asked to stop", 1)
    assert first["began"] < first["ended"] < second["began"]
    assert (second["status"], second["ended"], second["restarts"]) == (None, None, 0)
