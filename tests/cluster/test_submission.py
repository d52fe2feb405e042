"""What a submission decides before a cluster is asked."""

import shlex
from pathlib import Path

import pytest
from raylign.cluster import jobs
from raylign.cluster.errors import InputError
from raylign.cluster.jobs import Job, _Reader, is_loopback
from raylign.cluster.submission import Submission, entrypoint, job_storage


def test_the_note_is_found_again(tmp_path: Path) -> None:
    note = Submission("a", "http://127.0.0.1:8265", "raylign-a-2", ("raylign-a-1", "raylign-a-2"), str(tmp_path))
    note.save()
    assert Submission.load(tmp_path, "a") == note
    assert Submission.load(tmp_path, "b") is None


def test_storage_is_absolute_here_and_must_be_given_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_storage(None, "http://127.0.0.1:8265") == str(tmp_path / "runs")
    assert job_storage("/shared", "http://10.0.0.5:8265") == "/shared"
    for storage in (None, "runs"):
        with pytest.raises(InputError, match="another machine: give --storage"):
            job_storage(storage, "http://10.0.0.5:8265")
    with pytest.raises(InputError, match="mount the bucket"):
        job_storage("s3://bucket/runs", "http://10.0.0.5:8265")


def test_loopback_is_told_from_the_network() -> None:
    assert is_loopback("http://127.0.0.9:1")
    assert is_loopback("http://localhost:1")
    assert is_loopback("http://[::1]:1")
    assert not is_loopback("http://10.0.0.5:1")
    assert not is_loopback("http://cluster.example:1")


def test_the_command_survives_the_shell() -> None:
    command = entrypoint("my recipe.yaml", "a", "/some where", ['model.path="/a b"', "seed=2"])
    assert shlex.split(command)[:5] == ["python", "-m", "raylign.cli", "run", "my recipe.yaml"]
    assert shlex.split(command)[-4:] == ["--set", 'model.path="/a b"', "--set", "seed=2"]


def test_each_character_of_a_log_is_written_once() -> None:
    written: list[str] = []
    reader = _Reader(written.append, seen=2)
    for stream in (["abc", "de"], ["ab", "cdef"], ["abcdefg"]):
        reader.begin()
        for text in stream:
            reader.feed(text)
    assert "".join(written) == "cdefg"


def test_a_folder_too_large_to_send_names_its_largest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UPLOAD_LIMIT", 2**20)
    for name, size in (("small", 2**10), ("model", 2**21), (".venv", 2**22), ("runs", 2**22)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"0" * size)
    with pytest.raises(InputError, match=r"holds 2 MiB and a job may bring 1; the largest part is model \(2 MiB\)"):
        jobs._require_small(tmp_path)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("succeeded", 0, 0), ("failed", 3, 3), ("failed", 137, 1), ("failed", None, 1), ("stopped", None, 1)],
)
def test_the_exit_code_follows_the_job(status: str, driver: int | None, code: int) -> None:
    assert Job("id", "a", 1, status, driver_exit_code=driver).exit_code == code


def test_an_address_without_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="http://HOST:PORT"):
        jobs.Jobs("127.0.0.1:8265")
