"""Wishes of a run: signed with the cluster's token, and nothing without it."""

import json
from pathlib import Path

import pytest
from raylign.cluster.errors import ClusterUnreachable
from raylign.cluster.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that listens to those with the token `ours`."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")
    run = RunDir(tmp_path / "demo")
    run.listen()
    return run


def forge(run: RunDir, text: str) -> None:
    (run / "desired.json").write_text(text)


def refused(run: RunDir) -> int:
    return len(run.events("wish_refused"))


def test_a_wish_of_someone_with_the_token_counts(run: RunDir) -> None:
    RunDir(run.path).desire(rollout=4)
    assert run.desired()["rollout"] == 4
    assert "signature" not in run.desired()
    assert "ours" not in (run / "desired.json").read_text() + (run / "status.json").read_text()
    assert refused(run) == 0


def test_a_wish_that_is_not_signed_is_noted_and_does_nothing(run: RunDir) -> None:
    for text in (
        '{"stop": true}',
        '{"stop": true, "signature": "00"}',
        '{"stop": true, "signature": 7}',
        '{"stop": true, "signature": "é"}',
    ):
        forge(run, text)
        assert run.desired() == {}
        assert run.desired() == {}
    assert refused(run) == 4


def test_a_signed_wish_that_was_changed_does_nothing(run: RunDir) -> None:
    run.desire(rollout=2)
    written = json.loads((run / "desired.json").read_text())
    forge(run, json.dumps(written | {"rollout": 9}))
    assert run.desired() == {}


def test_another_runs_wish_does_nothing_here(run: RunDir) -> None:
    other = RunDir(run.path.parent / "other")
    other.listen()
    other.desire(stop=True)
    forge(run, (other / "desired.json").read_text())
    assert run.desired() == {}


def test_a_later_wish_does_not_sign_what_was_slipped_in(run: RunDir) -> None:
    forge(run, '{"stop": true}')
    run.desire(rollout=3)
    assert run.desired() == {"rollout": 3}


def test_who_has_another_token_is_told_so_at_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.desire(rollout=2)
    before = (run / "desired.json").read_text()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    with pytest.raises(ClusterUnreachable, match="listens to those with its cluster's token"):
        RunDir(run.path).desire(stop=True)
    assert (run / "desired.json").read_text() == before
    # a run that goes on in their cluster listens to them
    RunDir(run.path).listen()
    RunDir(run.path).desire(stop=True)
    assert run.desired()["stop"] is True


def test_where_no_token_is_asked_for_every_wish_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    run = RunDir(tmp_path / "open")
    run.listen()
    forge(run, '{"stop": true}')
    assert run.desired() == {"stop": True}
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert run.desired() == {"stop": True}
