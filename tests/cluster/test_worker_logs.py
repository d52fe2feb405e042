"""What actors print on any node stands in the controller's log."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys, time
from pathlib import Path
from raylign.cluster.config import ClusterConfig
from raylign.cluster.session import connect

logging.basicConfig(filename=sys.argv[1], level=logging.INFO)
with connect(ClusterConfig(cpus=2), dashboard=False):
    import ray

    @ray.remote
    class Scorer:
        def say(self, text):
            print(text, flush=True)
            print(f"{text}, badly", file=sys.stderr, flush=True)

    actors = [Scorer.remote() for _ in range(2)]
    ray.get([actor.say.remote(f"hello from {n}") for n, actor in enumerate(actors)])
    deadline = time.monotonic() + 30
    while Path(sys.argv[1]).read_text().count("badly") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
"""


def test_lines_of_all_workers_are_merged_and_none_is_printed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in log.read_text().splitlines() if "Scorer" in line]
    for n in range(2):
        (said,) = [line for line in lines if line.endswith(f": hello from {n}")]
        assert said.startswith("INFO:raylign.workers:Scorer (pid ")
        (badly,) = [line for line in lines if line.endswith(f": hello from {n}, badly")]
        assert badly.startswith("WARNING:raylign.workers:Scorer (pid ")
    assert "hello" not in done.stdout + done.stderr
