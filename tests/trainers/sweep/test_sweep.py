"""`raylign sweep` on a real Ray: trials are runs, the worse are ended early, an interrupted sweep goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raylign.cluster.rundir import RunDir

RECIPE = """\
name: small
seed: 3
model: {{path: {model}}}
cluster: {{cpus: 2}}
stages:
  - type: sft
    adapter: {{type: lora, r: 4}}
    data: {{path: rows.jsonl}}
    steps: {steps}
    batch_size: 4
"""


def write(folder: Path, model: Path, steps: int) -> Path:
    said = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 8)
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(model=model, steps=steps))
    return path


def sweep(recipe: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raylign.cli", "sweep", str(recipe), "--json", *more]
    return subprocess.Popen(
        command, cwd=recipe.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_learning_rate_that_learns_is_found_and_a_run_that_fails_fails_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    rates = "stages.0.learning_rate=grid(1e-2, 1e-7, 1e-6)"
    process = sweep(write(tmp_path, tiny_model, 12), "--param", rates, "--trials", "1", "--grace", "4")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert (facts["metric"], facts["mode"]) == ("loss", "min")
    best, *others = facts["trials"]
    assert best["values"] == {"stages.0.learning_rate": 1e-2}
    assert (best["run"], best["status"], best["step"]) == (facts["best"], "finished", 12)
    assert all(trial["best"] > best["best"] for trial in others)
    storage = Path(facts["storage"])
    assert RunDir.find(storage, best["run"]).summary()["status"] == "succeeded"
    assert sorted(path.name for path in map(Path, facts["plots"])) == ["curves.png", "stages.0.learning_rate.png"]
    assert json.loads((storage / "sweep.json").read_text())["best"] == facts["best"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_sweep_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, tiny_model, 400)
    rates = "stages.0.learning_rate=choice(1e-4, 1e-3)"
    options = ("--param", rates, "--trials", "1", "--set", "stages.0.checkpoint_every=5")
    process = sweep(recipe, *options)
    run = RunDir(tmp_path / "runs" / "small-sweep" / "trial-00000")
    deadline = time.monotonic() + 200
    while len(run.all_metrics()) < 10:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    assert run.status()["status"] == "stopped"
    done = run.status()["step"]
    again = sweep(recipe, *options, "--set", "stages.0.steps=400")
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    (trial,) = json.loads(out)["trials"]
    assert (trial["status"], trial["step"]) == ("finished", 400)
    assert len(run.events("run_began")) == 2
    assert 0 < done < 400
