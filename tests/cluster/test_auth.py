"""The token's file: made once, closed to others."""

import stat
import threading
from pathlib import Path

import pytest
from raylign.cluster import auth
from raylign.cluster.errors import InputError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    file = tmp_path / "home" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    return file


def test_a_token_is_made_for_its_owner_only(path: Path) -> None:
    assert auth.read_token() is None
    token = auth.ensure_token()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert auth.ensure_token() == token
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_others_may_read_is_closed(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("secret\n")
    path.chmod(0o644)
    assert auth.read_token() == "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_environment_comes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-environment")
    assert auth.ensure_token() == "from-environment"
    assert not path.exists()


def test_all_who_make_it_at_once_get_the_same(path: Path) -> None:
    tokens: list[str] = []
    threads = [threading.Thread(target=lambda: tokens.append(auth.ensure_token())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8
    assert len(set(tokens)) == 1


def test_an_empty_file_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(InputError, match="is empty: remove it"):
        auth.ensure_token()
