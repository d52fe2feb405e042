"""The command line as tests call it: in this process, so that the heavy imports are paid for once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The line that says what is wrong; there must be just one, and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Ended]


@pytest.fixture
def raylign(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a command in this process, in a folder of its own; one that starts or joins a Ray fails the test.

    A run's controller is this process too, without a supervisor, which would fork it.
    """
    import ray
    from raylign.cli.main import main
    from raylign.cluster import supervisor

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("a Ray was started or joined")

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["raylign", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, printed.out, printed.err)

    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.setattr(supervisor, "supervised", lambda *_: supervisor.Attempt())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return call
