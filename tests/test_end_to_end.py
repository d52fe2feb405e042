"""The quickstart, small, as a user runs it: interrupted, resumed, served, asked. Real processes, signals and ports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "prepare.options={documents: 256, demonstrations: 64, prompts: 64, questions: 16}",
    "stages.0.steps=4",
    "stages.1.steps=4",
    "stages.1.workers=1",
    "stages.2.steps=60",
    "stages.2.batch_size=16",
    "stages.2.warmup_steps=1",
]


def raylign(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raylign.cli", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    )


def output(*arguments: str, cwd: Path, code: int = 0) -> str:
    process = raylign(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def interrupted(place: Path) -> Path:
    """A quickstart that got Ctrl-C in the middle of GRPO; gives its run directory."""
    overrides = [part for key in SMALL for part in ("--set", key)]
    process = raylign("run", str(ROOT / "recipes/quickstart.yaml"), *overrides, cwd=place)
    run = place / "runs" / "quickstart"
    try:
        until(lambda: process.poll() is not None or len(steps(run)) > 2, 240, "GRPO to begin")
        assert process.poll() is None, process.communicate()[1]
        check_actors(read(run / "status.json")["dashboard"])
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 8
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C is for all of its processes
        process.wait(timeout=60)
        assert time.monotonic() - began < 20
        assert process.returncode == 1
        until(lambda: not any(p.is_running() for p in below), 10, f"the end of {below}")
    finally:
        if process.poll() is None:
            process.kill()
    return run


def steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["stage"] == "grpo"]


def check_actors(dashboard: str) -> None:
    """`ray list actors` shows each role by name."""
    code = "from ray.util.state import list_actors; print([a.name for a in list_actors()])"
    environment = os.environ | {"RAY_ADDRESS": dashboard, "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for role in ("policy-0", "reference", "reward-0", "rollout-0", "rollout-1"):
        assert f"quickstart/grpo/{role}" in done.stdout


def test_an_interrupted_run_keeps_what_it_did(interrupted: Path) -> None:
    status = read(interrupted / "status.json")
    assert (status["status"], status["stage"]) == ("stopped", "grpo")
    assert read(interrupted / "summary.json")["status"] == "stopped"
    kept = sorted((interrupted / "checkpoints/2-grpo").glob("step-*"))
    assert int(kept[-1].name.removeprefix("step-")) == status["step"] >= 2
    assert [s["name"] for s in json.loads((interrupted / "progress.json").read_text())] == ["cpt", "sft"]


@pytest.fixture(scope="module")
def resumed(interrupted: Path, place: Path) -> dict[str, Any]:
    """The interrupted run gone on with to its end; its summary."""
    done = len(steps(interrupted))
    summary = json.loads(output("resume", "quickstart", "--json", cwd=place))
    assert [s["step"] for s in steps(interrupted)[done - 1 :]][-1] == 59
    return summary


def test_a_resumed_run_ends_with_everything(resumed: dict[str, Any], interrupted: Path) -> None:
    assert resumed["status"] == "succeeded"
    assert [(s["type"], s["steps"]) for s in resumed["stages"]] == [("cpt", 4), ("sft", 4), ("grpo", 60)]
    assert set(resumed["evaluation"]["models"]) == {"quickstart-base", "quickstart-sft", "quickstart-grpo"}
    assert resumed["evaluation"]["after"]["n"] == 16
    assert isinstance(resumed["evaluation"]["forgetting"], float)
    assert resumed["served"]["model"] == "sums"
    assert resumed["promotion"]["promoted"]
    assert resumed["weights"]["version"] == 60
    assert (interrupted / "adapters" / resumed["weights"]["digest"] / "adapter_model.safetensors").exists()
    assert 0 < resumed["peak_memory_gb"] < 8
    assert resumed["workers"] == {"min": 2, "max": 2}
    assert resumed["wall_seconds"] > read(interrupted / "summary.json")["stages"][0]["seconds"]
    assert "data:image/png;base64" in (interrupted / "report.html").read_text()
    assert list((interrupted / "plots").glob("*.png"))
    assert list((interrupted / "wandb").glob("*offline-run-*"))
    assert [s["step"] for s in steps(interrupted)] == list(range(60))


def test_the_base_is_an_ordinary_model_folder(resumed: dict[str, Any], interrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = interrupted / "models" / "0-cpt"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 500_000 < model.num_parameters() < 3_000_000
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_status_and_logs_of_a_finished_run(resumed: dict[str, Any], place: Path) -> None:
    facts = json.loads(output("status", "quickstart", "--json", cwd=place))
    assert (facts["status"], facts["stage"], facts["step"], facts["steps"]) == ("succeeded", "grpo", 60, 60)
    assert [r["run"] for r in json.loads(output("status", "--json", cwd=place))] == ["quickstart"]
    output("logs", "quickstart", "-f", cwd=place)
    output("scale", "quickstart", "--rollout", "3", cwd=place, code=2)
    again = json.loads(output("resume", "quickstart", "--json", cwd=place))
    assert again == read(place / "runs/quickstart/summary.json")


@pytest.fixture(scope="module")
def service(resumed: dict[str, Any], place: Path) -> Iterator[str]:
    process = raylign("serve", "quickstart", "--json", cwd=place)
    try:
        note = place / "runs/registry/service.json"
        until(lambda: process.poll() is not None or note.exists(), 120, "the service")
        assert process.poll() is None, process.communicate()[1]
        yield read(note)["url"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()


def test_query_asks_each_model_and_names_its_digest(service: str, resumed: dict[str, Any], place: Path) -> None:
    import openai

    answer = output("query", "sums", "123+456", "--max-tokens", "8", cwd=place)
    client = openai.OpenAI(base_url=f"{service}/v1", api_key="none")
    messages = [{"role": "user", "content": "123+456"}]
    same = client.chat.completions.create(model="sums", messages=messages, temperature=0, max_tokens=8)
    assert answer.strip() == (same.choices[0].message.content or "").strip()
    assert resumed["weights"]["digest"] in (same.system_fingerprint or "")
    listed = {model.id for model in client.models.list()}
    assert {"sums", "quickstart-base", "quickstart-sft", "quickstart-grpo"} <= listed
    models = json.loads(output("models", "--json", cwd=place))
    assert resumed["weights"]["digest"] in json.dumps(models)


def test_a_second_run_of_the_recipe_takes_the_next_name(resumed: dict[str, Any], place: Path) -> None:
    from raylign.trainers.opening import open_run
    from raylign.trainers.recipe import load_recipe

    config = load_recipe(ROOT / "recipes/quickstart.yaml")
    assert open_run(config, place / "runs", named=False, resume=False).name == "quickstart-2"


def test_the_readme_speaks_of_verbs_that_exist() -> None:
    from raylign.cli.main import VERBS

    spoken = set(re.findall(r"raylign (\w+)", "".join(re.findall(r"```(?:bash|sh)\n(.*?)```", readme(), re.S))))
    assert spoken <= set(VERBS)
    assert set(VERBS) <= spoken


def readme() -> str:
    return (ROOT / "README.md").read_text()
