"""The benchmark of weight updates: a quick run through Ray, and what it says of bytes and times."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.models import SHAPES
from benchmarks.sync import _spread, cases

ROOT = Path(__file__).parents[2]


def test_times_are_quantiles_in_milliseconds() -> None:
    taken = [(0.001, 0.001 * (n + 1)) for n in range(101)]
    assert _spread(taken) == {"published_p50": 1.0, "p50": 51.0, "p99": 100.0}


def test_each_size_has_every_number_of_workers() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) == 8
    assert [n for n in names if n.startswith("120M") and "adapter" in n] == [
        f"120M-{n}-adapter-vs-full" for n in ("1-worker", "2-workers", "4-workers")
    ]


def test_a_quick_run_proves_an_adapter_and_all_weights() -> None:
    call = [sys.executable, "-m", "benchmarks", "sync", "--quick", "--case", "*-adapter-*", "--pairs", "1", "--json"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (case,) = json.loads(done.stdout)["cases"]
    settings = case["settings"]
    norms = (2 * SHAPES["1M"].layers + 1) * SHAPES["1M"].hidden
    assert settings["megabytes"]["full"] == round((SHAPES["1M"].parameters + norms) * 4 / 1e6, 1)
    assert settings["megabytes"]["adapter"] < settings["megabytes"]["full"]
    for kind in ("adapter", "full"):
        assert 0 < settings["milliseconds"][kind]["p50"] <= settings["milliseconds"][kind]["p99"]
    assert 0 < case["limit_fraction"] < 1
