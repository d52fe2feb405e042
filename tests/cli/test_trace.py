"""`raylign trace`: lanes of a run as a trace viewer reads them."""

import json
from pathlib import Path

from raylign.cluster.rundir import RunDir

from .conftest import Command


def test_spans_become_threads_of_a_trace(raylign: Command, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "demo")
    run.path.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    run.span("policy-0", "update", 100.5, 101.0, step=0)
    run.span("rollout-0", "generate", 100.0, 100.5, step=0)
    run.span("rollout-0", "generate", 101.0, 101.25, step=1)

    told = json.loads(raylign("trace", "demo", "--storage", tmp_path / "runs").out)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in told if e["name"] == "thread_name"}
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]["step"]) for e in told if e["ph"] == "X"]
    assert spans == [
        ("rollout-0", "generate", 0, 500_000, 0),
        ("policy-0", "update", 500_000, 500_000, 0),
        ("rollout-0", "generate", 1_000_000, 250_000, 1),
    ]
    out = tmp_path / "step.json"
    assert raylign("trace", "demo", "--step", 1, "--out", out, "--storage", tmp_path / "runs").code == 0
    assert [e["ts"] for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"] == [0]
    ended = raylign("trace", "demo", "--step", 7, "--storage", tmp_path / "runs")
    assert (ended.code, "has no step 7 yet: there are 0 to 1" in ended.said) == (2, True)
    assert raylign("trace", "dome", "--storage", tmp_path / "runs").code == 4
