"""vLLM as a peer: a long-lived process in `.venv-vllm` that waits, without using the core, until it is asked to run."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from .measured import Measured, Skipped
from .models import TORCH_NAMES, Dtype
from .workloads import Workload

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
_SLOTS = 64
_MAX_LENGTH = 1024
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""The engine in the process itself, one thread: the affinity to one core is inherited."""


class Vllm:
    """Raises `Skipped` where the environment is missing or vLLM does not start."""

    def __init__(self, folder: Path, dtype: Dtype, exits: ExitStack) -> None:
        if not PYTHON.exists():
            raise Skipped(f"{PYTHON.parents[1].name} is missing")
        settings = {
            "model": str(folder),
            "dtype": TORCH_NAMES[dtype],
            "max_num_seqs": _SLOTS,
            "max_model_len": _MAX_LENGTH,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        self._log = exits.enter_context((folder.parent / f"vllm-{folder.name}.log").open("w+"))
        self._process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("vllm_server.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
        )
        exits.callback(self._close)
        self._read()

    def run(self, work: Workload, pair: int) -> Measured:
        """Generate all requests; the time is the server's own, without the pipe."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        print(json.dumps({"prompts": work.prompts(pair), "lengths": work.lengths}), file=stdin, flush=True)
        answer = self._read()
        if sorted(answer["lengths"]) != sorted(work.lengths):
            raise RuntimeError(f"vLLM generated {sum(answer['lengths'])} tokens where {work.useful} were wanted")
        return Measured(amount=work.useful, seconds=answer["seconds"], cpu_seconds=answer["cpu_seconds"])

    def _read(self) -> dict[str, Any]:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self._log.seek(0)
            raise Skipped(f"vLLM ended: {self._log.read()[-1500:].strip()}")
        return json.loads(line)

    def _close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
