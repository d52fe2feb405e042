"""vLLM's processes: what is said when they die, and that they do not outlive the actor that began them."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import WorkerLost

from .conftest import ask

pytestmark = pytest.mark.vllm

HOLD = """
import json, sys, time
from pathlib import Path

import psutil


def main():
    from raylign.rollout.engines import ENGINES

    engine = ENGINES["vllm"](Path(sys.argv[1]), 8, 100, "float32", "cpu")
    print(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]), flush=True)
    time.sleep(1000)


if __name__ == "__main__":
    main()
"""


def step_to_the_end(engine: Any) -> None:
    while engine.busy:
        engine.step()


def test_they_end_with_a_process_that_is_killed(llama: Path, tmp_path: Path):
    (tmp_path / "hold.py").write_text(HOLD)
    with subprocess.Popen([sys.executable, "hold.py", str(llama)], cwd=tmp_path, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        children = [psutil.Process(pid) for pid in json.loads(holder.stdout.readline())]
        assert len(children) >= 2
        holder.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=20)
    assert not left


def test_when_they_are_gone_every_call_says_so(engine: Any, llama: Path):
    from safetensors.numpy import load_file

    engine.submit(ask(1, max_tokens=300))
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("VLLM"):
            child.kill()
    with pytest.raises(WorkerLost, match="vLLM's engine process is gone"):
        step_to_the_end(engine)
    assert not engine.busy
    engine.abort("r1")
    with pytest.raises(WorkerLost, match="gone"):
        engine.load_base(load_file(llama / "model.safetensors"))
    engine.submit(ask(2))
    with pytest.raises(WorkerLost, match="gone"):
        step_to_the_end(engine)
