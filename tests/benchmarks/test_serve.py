"""The benchmark of the service, with the smallest model, for real."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.serve import latencies

ROOT = Path(__file__).parents[2]


def test_a_quick_run_measures_both_sides_latencies() -> None:
    call = [sys.executable, "-m", "benchmarks", "serve", "--quick", "--json", "--pairs", "1"]
    run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(run.stdout)["cases"]
    assert case["case"] == "1M-fp32-C2-vs-engine"
    assert 0 < case["raw"][0]["ours_amount"] <= 4 * 32
    for side in ("ours", "theirs"):
        seen = case["settings"]["latency"][side]
        assert 0 < seen["first_token_p50_ms"] <= seen["first_token_p99_ms"] <= seen["answer_p99_ms"]
        assert seen["per_token_p50_ms"] > 0


def test_percentiles_lie_between_what_was_measured() -> None:
    rows = [{"first": 0.01, "last": 0.01 + 0.002 * 10, "tokens": 11}, {"first": 0.03, "last": 0.03, "tokens": 1}]
    assert latencies(rows) == {
        "first_token_p50_ms": 20.0,
        "first_token_p99_ms": 29.8,
        "per_token_p50_ms": 2.0,
        "per_token_p99_ms": 2.0,
        "answer_p50_ms": 30.0,
        "answer_p99_ms": 30.0,
    }
