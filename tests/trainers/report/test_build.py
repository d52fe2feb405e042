"""The report of a run, written from a synthetic run directory."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.report.build import duration, number, wilson, write_report
from raylign.trainers.report.lanes import lane_order, middle_steps
from raylign.trainers.report.plots import column, draw_plots

EXAMPLES = [{"prompt": [{"role": "user", "content": "What is 1<2?"}], "answer": "=True", "grade": 1.0}]
BEGIN = 1_700_000_000.0


def make_run(path: Path, steps: int = 60, workers: int = 2) -> RunDir:
    """A finished run with an SFT and a GRPO stage."""
    random.seed(0)
    path.mkdir(parents=True)
    run = RunDir(path)
    (path / "recipe.yaml").write_text("name: <i>quick</i>\nseed: 7\n")
    lines = []
    for step in range(1, 41):
        lines.append({"stage": "sft", "step": step, "loss": 2 / step + 0.1 * random.random(), "learning_rate": 1e-3})
    now = BEGIN
    for step in range(1, steps + 1):
        generate, update = 0.5 + 0.1 * random.random(), 0.2 + 0.05 * random.random()
        lines.append(grpo_metrics(step, generate, update))
        for w in range(workers):
            run.span(f"rollout-{w}", "generate", now, now + generate * (1 - 0.2 * w), step=step)
        run.span("reward-0", "score", now + generate, now + generate + 0.05, step=step)
        run.span("reference", "reference", now + generate, now + generate + 0.1, step=step)
        run.span("policy-0", "update", now + generate + 0.1, now + generate + 0.1 + update, step=step)
        run.span("policy-0", "publish", now + generate + 0.1 + update, now + generate + 0.12 + update, step=step)
        now += generate + update + 0.15
    run.event("scaled", rollout=2, why="<script>alert(1)</script>")
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"time": BEGIN + i, **m}) + "\n" for i, m in enumerate(lines))
    )
    return run


def grpo_metrics(step: int, generate: float, update: float) -> dict[str, object]:
    right = 1 / (1 + math.exp(-(step - 25) / 8))
    return {
        "stage": "grpo",
        "step": step,
        "reward/mean": right + 0.09,
        "reward/std": 0.45 * (1 - right) + 0.05,
        "reward/exact": right,
        "reward/format": 0.9,
        "kl": 0.02 * right + 0.002 * random.random(),
        "entropy": 0.8 - 0.5 * right,
        "loss": 0.01 * random.random(),
        "grad_norm": 0.5 + random.random(),
        "learning_rate": 2e-3,
        "completion_length/mean": 12 + 10 * right,
        "completion_length/max": 28,
        "truncated": 0.05 * (1 - right),
        "groups/no_variance": int(10 * right),
        "mismatch/mean": 1e-6,
        "mismatch/max": 1e-4 * (1 + random.random()),
        "clip_fraction": 0.01,
        "tokens": 2000,
        "tokens_per_second": 2500 + 100 * random.random(),
        "seconds/generate": generate,
        "seconds/score": 0.05,
        "seconds/reference": 0.1,
        "seconds/update": update,
        "seconds/publish": 0.02,
    }


def summary() -> dict[str, object]:
    return {
        "run": "quick",
        "status": "succeeded",
        "reason": None,
        "seed": 7,
        "stages": [
            {"type": "sft", "steps": 40, "seconds": 17.0, "metrics": {"loss": 0.31}},
            {"type": "grpo", "steps": 60, "seconds": 50.2, "metrics": {"reward/mean": 1.05, "kl": 0.02}},
        ],
        "evaluation": {
            "before": {"greedy": 0.04},
            "after": {"greedy": 0.985},
            "models": {
                "base": {"greedy": 0.0, "t1": 0.0, "n": 200},
                "sft": {"greedy": 0.55, "t1": 0.41, "n": 200},
                "quick": {"greedy": 0.985, "t1": 0.94, "n": 200, "examples": EXAMPLES},
            },
        },
        "weights": {"version": 60, "digest": "ab" * 32},
        "served": {"model": "quick", "url": "http://127.0.0.1:8000"},
        "wall_seconds": 245.0,
        "peak_memory_gb": 3.21,
        "restarts": 0,
        "workers": {"min": 1, "max": 2},
    }


def test_report_of_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "quick")
    run.write_summary(summary())
    path = write_report(run)
    text = path.read_text()
    assert path == tmp_path / "quick" / "report.html"
    for fact in (
        "succeeded",
        "4 min 05 s",
        "98.5 %",
        "v60 · abababababab",
        "1 – 2",
        "3.21 GB",
        "reward/mean <b>1.05</b>",
    ):
        assert fact in text
    names = {p.name for p in (tmp_path / "quick" / "plots").glob("*.png")}
    wanted = {"reward", "accuracy", "kl", "entropy", "length", "loss", "time", "mismatch", "throughput"}
    assert {f"grpo-{w}.png" for w in wanted} | {"sft-loss.png", "lanes.png", "lanes-steps.png"} <= names
    assert text.count("data:image/png;base64,") == len(names)


def test_report_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "quick", steps=3)
    run.write_summary(summary() | {"status": "failed", "reason": "reward gave <img src=x>"})
    text = write_report(run).read_text()
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)
    for raw in ("<script", "<i>quick</i>", "<img src=x>"):
        assert raw not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_report_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    run = RunDir(tmp_path / "new")
    assert "unknown" in write_report(run).read_text()
    run.update_status(status="running", stage="grpo", step=1, steps=60)
    run.metrics("grpo", 1, {"reward/mean": 0.5, "reward/std": float("nan"), "seconds/generate": 1.0})
    run.span("rollout-0", "generate", BEGIN, BEGIN + 1)
    text = write_report(run).read_text()
    assert "grpo, step 1 of 60" in text
    assert text.count("data:image/png") == 3


def test_accuracy_is_taken_from_the_reward_that_says_so(tmp_path: Path) -> None:
    records = [{"stage": "rl", "step": s, "reward/mean": 1.0, "reward/exact_match": 0.5} for s in (1, 2)]
    assert "rl-accuracy.png" in {p.path.name for p in draw_plots(records, [], tmp_path)}
    assert math.isnan(column([{"a": "x"}, {"a": 1}], "a")[0])


def test_lanes_are_in_the_order_of_roles_and_numbers() -> None:
    lanes = ["rollout-10", "rollout-2", "reward-0", "policy-0", "eval", "reference"]
    assert lane_order(lanes) == ["policy-0", "reference", "rollout-2", "rollout-10", "reward-0", "eval"]


def test_window_covers_four_steps_in_the_middle() -> None:
    spans = [{"lane": "policy-0", "what": "update", "start": 2.0 * i + 1, "end": 2.0 * i + 2} for i in range(20)]
    assert middle_steps(spans) == pytest.approx((20.0, 28.4))
    assert middle_steps(spans[:8]) is None


def test_numbers_for_readers() -> None:
    assert [number(v) for v in (0.0123456, 1234.5678, 7, 3.0, "x")] == ["0.0123", "1,235", "7", "3", "x"]
    assert [duration(s) for s in (4.21, 65, 3720)] == ["4.2 s", "1 min 05 s", "1 h 02 min"]
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 50)[1] == 1.0
