"""Keys: only their hashes are kept, changes count at once, and a key says which models and how much."""

import json
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError, NotFound
from raylign.serve.admission import Admission, Bucket, Quotas
from raylign.serve.api_errors import ApiError
from raylign.serve.keys import Key, KeyRing, add_key, read_keys, remove_key


def test_a_key_is_found_by_its_secret_which_is_kept_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = add_key(path, "alice", models=("first",))
    other = add_key(path, "bob")
    ring = KeyRing(path)
    found = ring.find(secret)
    assert found
    assert (found.name, found.models) == ("alice", ("first",))
    assert ring.find(secret[:-1]) is ring.find("") is ring.find(found.sha256) is None
    assert secret not in path.read_text()
    assert other not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_changes_count_at_once_and_a_file_that_went_away_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing(path)
    assert not ring.required
    secret = add_key(path, "alice")
    assert ring.required
    assert ring.find(secret)
    remove_key(path, "alice")
    assert ring.required
    assert ring.find(secret) is None
    secret = add_key(path, "alice")
    path.write_text("{")
    assert ring.find(secret) is None
    path.unlink()
    assert ring.required
    assert ring.find(secret) is None


def test_what_is_wrong_with_a_key_or_its_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "alice")
    with pytest.raises(InputError, match="a key 'alice' already"):
        add_key(path, "alice")
    with pytest.raises(InputError, match=r"key '\.\./x'"):
        add_key(path, "../x")
    with pytest.raises(InputError, match="tokens_per_minute"):
        add_key(path, "bob", tokens_per_minute=0)
    with pytest.raises(NotFound, match="there are alice"):
        remove_key(path, "bob")
    path.write_text(json.dumps({"keys": [{"name": "x", "sha256": "secret"}]}))
    with pytest.raises(InputError, match=r"keys\.0\.sha256"):
        read_keys(path)


def test_a_bucket_fills_at_a_sixtieth_of_a_minutes_worth_a_second() -> None:
    bucket = Bucket.full(30, now=100.0)
    assert bucket.wait(1, 100.0) == 0
    bucket.level -= 31
    assert bucket.wait(1, 100.0) == pytest.approx(4.0)  # one and the one it owes, at half a token a second
    assert bucket.wait(1, 102.0) == pytest.approx(2.0)
    assert bucket.wait(1, 104.0) == 0
    bucket.wait(1, 10_000.0)
    assert bucket.level == 30


def test_a_key_waits_for_its_requests_and_for_tokens_it_has_overdrawn() -> None:
    key = Key(name="a", sha256="0" * 64, requests_per_minute=2, tokens_per_minute=60)
    quotas = Quotas()
    quotas.enter(key, 0.0)
    quotas.spend(key, 90, 0.0)
    with pytest.raises(ApiError, match="60 tokens a minute") as caught:
        quotas.enter(key, 0.0)
    assert caught.value.headers["retry-after"] == "32"  # 30 tokens owed and one more, at one a second
    quotas.enter(key, 31.5)
    quotas.enter(key, 61.0)
    with pytest.raises(ApiError, match="2 requests a minute"):
        quotas.enter(key, 61.0)
    quotas.enter(None, 61.0)
    quotas.enter(Key(name="b", sha256="1" * 64), 61.0)


def test_no_more_completions_are_let_in_than_there_are_places() -> None:
    admission = Admission(4)
    with admission.enter(3):
        with pytest.raises(ApiError) as caught, admission.enter(2):
            pass
        assert caught.value.status == 429
        with admission.enter(1):
            assert admission.inside == 4
    assert admission.inside == 0
    with admission.enter(9):
        assert admission.inside == 9, "alone, it would never be let in"
