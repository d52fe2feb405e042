"""`raylign serve`, `query` and `models` as a user runs them, on a Ray of their own."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .conftest import Shelf

RECIPE = """\
name: demo
model: {{path: {base}}}
stages: [{{type: sft, data: {{path: {base}/config.json}}, adapter: {{r: 2}}}}]
serve: {{alias: demo, max_length: 256, slots: 8}}
"""


def _raylign(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "raylign.cli", *arguments]


@dataclass
class Served:
    """A running `raylign serve demo`, its storage, and every process it has started."""

    process: subprocess.Popen[str]
    storage: Path
    children: list[psutil.Process]

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = _raylign(*arguments, "--storage", str(self.storage))
        return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def served(shelf: Shelf) -> Iterator[Served]:
    storage = shelf.registry.root.parent
    (storage / "demo").mkdir()
    (storage / "demo" / "recipe.yaml").write_text(RECIPE.format(base=shelf.base.path))
    shelf.registry.promote("demo-base", shelf.base.digest)
    shelf.registry.promote("demo", shelf.first.digest)
    command = _raylign("serve", "demo", "--storage", str(storage))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _until(lambda: (shelf.registry.root / "service.json").exists() or process.poll() is not None, 150)
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield Served(process, storage, psutil.Process(process.pid).children(recursive=True))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.1)


def test_query_answers_by_alias_streamed_or_not(served: Served, shelf: Shelf) -> None:
    options = ("--max-tokens", "12")
    streamed = served.ask("query", "demo", "Hi", *options)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == served.ask("query", "demo", "Hi", "--no-stream", *options).stdout
    facts = json.loads(served.ask("query", shelf.first.digest[:12], "Hi", "--json", *options).stdout)
    assert facts["digest"] == shelf.first.digest
    assert facts["text"] + "\n" == streamed.stdout


def test_models_lists_names_and_digests(served: Served, shelf: Shelf) -> None:
    listed = json.loads(served.ask("models", "--json").stdout)
    names = {model["digest"]: model["names"] for model in listed}
    assert {"demo", "first"} <= set(names[shelf.first.digest])
    assert shelf.first.digest[:12] in served.ask("models").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("query", "nobody", "Hi"), 4, "no model 'nobody'"),
        (("query", "demo", "Hi", "--temperature", "9"), 2, "temperature"),
        (("query", "demo", "Hi", "--url", "http://127.0.0.1:9"), 5, "no service answers at http://127.0.0.1:9"),
        (("serve", "demo"), 2, "is served already, by process"),
        (("serve", "other"), 4, "no run 'other'"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(
    served: Served, arguments: tuple[str, ...], code: int, says: str
) -> None:
    ended = served.ask(*arguments)
    assert ended.returncode == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not ended.stdout


def test_an_interrupt_ends_it_and_every_process_of_it(served: Served) -> None:
    assert len(served.children) > 3
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    output = served.process.stdout.read() if served.process.stdout else ""
    assert "/v1 answers as" in output
    assert "curl http://127.0.0.1:" in output
    _until(lambda: not any(child.is_running() for child in served.children), 10)
    assert not (served.storage / "registry" / "service.json").exists()
    after = served.ask("query", "demo", "Hi")
    assert (after.returncode, "no service is up" in after.stderr) == (4, True)
