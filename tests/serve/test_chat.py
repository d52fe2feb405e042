"""`raylign chat`, `query` and `keys` as a user runs them, against the application over the native engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylign.serve.keys import add_key, keys_path, read_keys
from raylign.serve.registry import Registry

from .conftest import Shelf
from .live import Live, live


def _raylign(*arguments: str, lines: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "raylign.cli", *arguments]
    environment = os.environ | variables
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, env=environment)


@pytest.fixture(scope="module")
def locked(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str]]:
    root = tmp_path_factory.mktemp("chat") / "registry"
    shutil.copytree(shelf.registry.root, root)
    with live(Registry(root), "tiny-base") as up:
        yield up, add_key(keys_path(root), "me", models=("first", "second"))


def test_a_conversation_is_told_what_was_said_and_goes_on_after_mistakes(locked: tuple[Live, str]) -> None:
    up, key = locked
    lines = "Hi\nAnd then?\n/model nobody\n/model second\nHi\n/clear\n/nonsense\n\nHi\n/models\n/quit\nnever asked\n"
    done = _raylign("chat", "first", "--url", up.url, "--max-tokens", "8", lines=lines, RAYLIGN_API_KEY=key)
    assert done.returncode == 0, done.stderr
    with up.client(key) as client:
        talk: list[dict[str, str]] = []

        def say(model: str, text: str) -> str:
            talk.append({"role": "user", "content": text})
            said = client.chat.completions.create(model=model, messages=talk, max_tokens=8, temperature=0)  # type: ignore[arg-type]
            talk.append({"role": "assistant", "content": said.choices[0].message.content or ""})
            return talk[-1]["content"]

        expected = [say("first", "Hi"), say("first", "And then?"), say("second", "Hi")]
        talk.clear()
        expected.append(say("second", "Hi"))
    assert done.stdout == "".join(f"{text}\n" for text in expected)
    assert "no model 'nobody'" in done.stderr
    assert "no /nonsense" in done.stderr
    listed = done.stderr.strip().splitlines()[-1].split(", ")
    assert {"first", "second"} <= set(listed)


@pytest.mark.parametrize(
    ("verb", "model", "key", "code", "says"),
    [
        ("chat", "first", "wrong", 2, "not known here: give --key or set RAYLIGN_API_KEY"),
        ("query", "first", "wrong", 2, "not known here"),
        ("chat", "tiny-base", "", 4, "no model 'tiny-base'"),
    ],
)
def test_who_may_not_ask_is_told_so(
    locked: tuple[Live, str], verb: str, model: str, key: str, code: int, says: str
) -> None:
    up, right = locked
    words = ("Hi",) if verb == "query" else ()
    done = _raylign(verb, model, *words, "--url", up.url, "--key", key or right)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_keys_are_made_listed_and_removed(tmp_path: Path) -> None:
    here = ("--storage", str(tmp_path))
    made = _raylign("keys", "add", "alice", "--models", "a,b", "--tokens-per-minute", "50", *here)
    assert made.returncode == 0, made.stderr
    path = keys_path(tmp_path / "registry")
    assert made.stdout.strip() not in path.read_text()
    (listed,) = json.loads(_raylign("keys", "--json", *here).stdout)
    assert listed == {"name": "alice", "models": ["a", "b"], "requests_per_minute": None, "tokens_per_minute": 50}
    assert _raylign("keys", "remove", "alice", *here).returncode == 0
    assert read_keys(path) == ()
    assert _raylign("keys", "remove", "alice", *here).returncode == 4
    assert _raylign("keys", "add", *here).returncode == 2
