"""The recipe's `prepare` function, run once in a process of its own: what it writes is `prepared://` to the run."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError
from ...rollout.rewards.functions import one_line
from ..config import RunConfig

_LOOK_EVERY_SECONDS = 0.2


def prepare(config: RunConfig, run: Path, tick: Callable[[], None] = lambda: None) -> None:
    """Fill `<run>/prepared`, unless an earlier attempt of this run has; all or nothing.

    `tick` is called while the function works; what it raises ends the function. Raises `InputError` with the last line
    of what the function printed when it failed.
    """
    final = run / "prepared"
    if config.prepare is None or final.exists():
        return
    draft = run / ".prepared"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    arguments = [config.prepare.path, str(draft), str(config.seed), json.dumps(config.prepare.options)]
    code, said = _watch([sys.executable, "-m", __name__, *arguments], tick)
    if code:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"prepare {config.prepare.path} failed: {last}")
    draft.rename(final)


def _watch(command: list[str], tick: Callable[[], None]) -> tuple[int, str]:
    """Run a command to its end; its exit code and what it said on stderr. It ends with whatever `tick` raises.

    It has a session of its own: a terminal's Ctrl-C is for the run, which decides what becomes of it.
    """
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        while True:
            tick()
            try:
                _, said = child.communicate(timeout=_LOOK_EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            return child.returncode, said
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def main(path: str, out: str, seed: str, options: str) -> None:
    """Import `file.py:function` and call it."""
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        sys.exit(f"there is no file {file}: prepare.path is file.py:function, relative to the recipe")
    try:
        _call(file, name, Path(out), int(seed), json.loads(options))
    except Exception as error:  # noqa: BLE001  whatever the user's code raises becomes one line for the parent
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        sys.exit(one_line(error) + (f" ({Path(file).name}:{lines[-1]})" if lines else ""))


def _call(file: str, name: str, out: Path, seed: int, options: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("prepare", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        near = get_close_matches(name, vars(module), n=1)
        sys.exit(f"{file} has no function {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    getattr(module, name)(out, seed, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
