"""The smallest cases, run for real against the real peers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import exact, gpu, group_prefill, mixed_adapters, rollout
from benchmarks.contestants import ContinuousBatching, Generate, Native
from benchmarks.models import load_model, save_model
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[2]


def test_a_quick_run_measures_and_writes_its_case(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "benchmarks", "rollout", "--quick", "--case", "*-vs-generate", "--json"]
    run = subprocess.run([*call, "--results", tmp_path / "results"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(run.stdout)["cases"]
    assert case["case"] == "1M-fp32-quick-vs-generate"
    assert case["pairs"] == len(case["raw"]) == 2
    assert 0 < case["ratio_min"] <= case["ratio_median"] <= case["ratio_max"]
    assert case["raw"][0]["ours_amount"] == case["settings"]["completion_tokens"]["sum"] == 31
    assert 0 < case["limit_fraction"] < 1
    written = json.loads((tmp_path / "results" / "rollout.json").read_text())
    assert written["cases"][0]["raw"] == case["raw"]
    assert "1M-fp32-quick-vs-generate" in (tmp_path / "README.md").read_text()


def test_every_peer_generates_what_is_wanted(tmp_path: Path) -> None:
    work = Workload(case="c", vocabulary=2048, prompt=5, lengths=(7, 7, 2, 2), group=2)
    folder = save_model("1M", "bf16", tmp_path / "model")
    sides = [
        Native(folder, "bf16", slots=8, max_length=16),
        Generate(load_model(folder, "bf16")),
        ContinuousBatching(folder, "bf16", slots=8, max_length=16),
    ]
    for side in sides:
        took = side.run(work, 1)
        assert took.amount == 18
        assert took.seconds > 0


def test_names_of_cases_are_unique() -> None:
    names = [c.name for module in (rollout, group_prefill, mixed_adapters, gpu) for c in module.cases()]
    assert len(set(names)) == len(names)
    assert "25M-fp32-p32-lognormal-vs-generate" in names
    assert len(rollout.cases()) == 3 * 2 * 2 * 2 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_its_cases_are_skipped_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--quick", "--case", "grpo*", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"cases": [], "skipped": {"grpo-1M-lora-bf16-p32-vs-trl": "no GPU"}}


def test_an_unknown_case_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["rollout", "--case", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err
    assert command.main(["rollout", "--case", "1M-fp32-p32-equal-*", "--list"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


def test_all_cores_and_their_threads_are_given_back() -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with exact._all_cores(before[0] + 1):
        assert torch.get_num_threads() == before[0] + 1
        assert len(os.sched_getaffinity(0)) == os.cpu_count()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
