"""Every shipped recipe parses; those on real rows run through the whole pipeline on a tiny random model."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from raylign.cluster.errors import InputError
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest, load_adapter
from raylign.rollout.config import MathReward
from raylign.rollout.records import Group, Sample
from raylign.rollout.rewards.functions import load_named
from raylign.rollout.rewards.scorer import Scorer
from raylign.rollout.sandbox.run import require
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe
from raylign.trainers.stages import OnlineStage

from ..rollout.rewards.http_service import Handler, serving

RECIPES = Path(__file__).parents[2] / "recipes"

VOWELLESS = "{type: format, pattern: '[^aeiou]*', name: vowelless, weight: 0.1}"
"""A second reward that a random model sometimes earns: with math alone all its rewards are 0 and nothing is learned."""


def run(recipe: str, storage: Path, *overrides: str) -> tuple[RunDir, dict[str, Any]]:
    """A recipe from its file to its summary, as `raylign run --set …` does it on a connected Ray."""
    config = load_recipe(RECIPES / recipe, overrides)
    run = open_run(config, storage, named=True, resume=False)
    return run, run_recipe(config, run, read_inputs(config, run.path), lambda _: None)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_recipe_parses_and_is_named_as_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_gsm8k_grpo_trains_on_real_questions(
    shared_data: Path, tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    math = '{type: math, answer: answer, answer_after: "####", timeout_seconds: 5}'
    done, summary = run(
        "gsm8k-grpo.yaml",
        tmp_path,
        f"model.path={tiny_model}",
        f"stages.0.data.path={shared_data / 'gsm8k/train.jsonl'}",
        "stages.0.data.limit=8",
        f"stages.0.held_out.path={shared_data / 'gsm8k/test.jsonl'}",
        "stages.0.held_out.limit=4",
        "stages.0.steps=2",
        "stages.0.batch_size=16",
        "stages.0.warmup_steps=0",
        "stages.0.rollout.max_prompt_tokens=1024",
        "stages.0.rollout.sampling.max_tokens=16",
        f"stages.0.rewards=[{math}, {VOWELLESS}]",
        "serve=null",
    )
    assert summary["status"] == "succeeded"
    assert [s["steps"] for s in summary["stages"]] == [2]
    metrics = done.all_metrics()
    assert [m["step"] for m in metrics] == [0, 1]
    assert all(np.isfinite([m["loss"], m["grad_norm"], m["reward/mean"]]).all() for m in metrics)

    answers = pq.read_table(done / "samples/grpo/held_out/step-000002.parquet").to_pylist()
    tests = [json.loads(line)["question"] for line in (shared_data / "gsm8k/test.jsonl").open()]
    assert [row["prompt"] for row in answers] == tests[:4]
    assert metrics[1]["held_out/reward"] == pytest.approx(np.mean([row["reward"] for row in answers]))

    rows = [row for n in range(2) for row in pq.read_table(done / f"samples/grpo/step-{n:06d}.parquet").to_pylist()]
    assert len(rows) == 2 * 16
    questions = {json.loads(line)["question"] for line in (shared_data / "gsm8k/train.jsonl").open()}
    assert {row["prompt"] for row in rows} <= questions
    assert {row["reward/math"] for row in rows} <= {0.0, 1.0}
    assert all(row["reward"] == pytest.approx(row["reward/math"] + 0.1 * row["reward/vowelless"]) for row in rows)

    assert summary["weights"]["version"] == 2
    tensors, config = load_adapter(done / "adapters" / summary["weights"]["digest"])
    assert config["r"] == 16
    assert any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_the_calculator_is_called_in_episodes_on_real_questions(
    shared_data: Path, tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    """A random model calls nothing, so its episodes have one turn; the calls are tested in tests/rollout."""
    done, summary = run(
        "calculator.yaml",
        tmp_path,
        f"model.path={tiny_model}",
        f"stages.0.data.path={shared_data / 'gsm8k/train.jsonl'}",
        "stages.0.data.limit=8",
        "stages.0.steps=1",
        "stages.0.batch_size=16",
        "stages.0.rollout.sampling.max_tokens=16",
        "serve=null",
    )
    assert summary["status"] == "succeeded"
    (metrics,) = done.all_metrics()
    assert metrics["turns/mean"] == 1
    rows = pq.read_table(done / "samples/grpo/step-000000.parquet").to_pylist()
    assert all(row["transcript"].startswith(row["completion"][:1]) for row in rows)
    assert {row["reward/environment"] for row in rows} == {0.0}


@pytest.mark.parametrize(
    ("expression", "value"), [("12 * (3 + 4)", "84"), ("-1/4", "-0.25"), ("0.1 + 0.2", "0.3"), ("1e3*2", "2000")]
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert load_named(f"{RECIPES}/calculator/tools.py:calculate", Path("/"), "tool")(expression) == value


@pytest.mark.parametrize("expression", ["2**9", "__import__('os')", "x", "1+" * 200 + "1", "(1).real"])
def test_the_calculator_takes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"only numbers|more than 200"):
        load_named(f"{RECIPES}/calculator/tools.py:calculate", Path("/"), "tool")(expression)


def test_code_and_a_judge_are_rewards_of_a_run(
    shared_data: Path, tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    """On real problems; the judge is a server that gives longer replies more, so that there is something to learn."""
    try:
        require()
    except InputError as error:
        pytest.skip(str(error))

    def judge(handler: Handler, body: Any) -> None:
        reply = body["messages"][0]["content"].rpartition("Reply: ")[2]
        handler.reply({"choices": [{"message": {"content": f"Score: {len(reply) % 11}"}}]})

    with gzip.open(shared_data / "code/HumanEval.jsonl.gz", "rt") as file:
        rows = sorted(file, key=len)[:8]
    (tmp_path / "code.jsonl").write_text("".join(rows))
    with serving(judge) as service:
        asked = f"{{type: judge, url: {service.url}/v1, model: m, principles: [Be long.], allow_private: true}}"
        done, summary = run(
            "code-grpo.yaml",
            tmp_path,
            f"model.path={tiny_model}",
            f"stages.0.data.path={tmp_path / 'code.jsonl'}",
            "stages.0.steps=2",
            "stages.0.batch_size=16",
            "stages.0.warmup_steps=0",
            "stages.0.rollout.sampling.max_tokens=16",
            "stages.0.rewards=[{type: code, entry_point: entry_point, prefix: prompt, timeout_seconds: 30}, "
            f"{{type: length, max_tokens: 16, buffer: 8}}, {asked}]",
            "serve=null",
        )
    assert summary["status"] == "succeeded"
    metrics = done.all_metrics()
    assert [m["step"] for m in metrics] == [0, 1]
    assert len(service.asked) == 2 * 16
    for found in metrics:
        assert found["reward/mean"] == pytest.approx(
            found["reward/code"] + found["reward/length"] + found["reward/judge"], abs=1e-6
        )
        assert found["reward/judge"] > 0


def test_the_gsm8k_reward_reads_the_real_answers(shared_data: Path) -> None:
    stage = load_recipe(RECIPES / "gsm8k-grpo.yaml").stages[0]
    assert isinstance(stage, OnlineStage)
    assert isinstance(stage.rewards[0], MathReward)
    row = json.loads((shared_data / "gsm8k/train.jsonl").open().readline())
    gold = row["answer"].rpartition("####")[2].strip()
    texts = [f"So it is \\boxed{{{gold}}}.", f"So it is \\boxed{{{gold}1}}.", "I do not know", ""]
    none = np.zeros(0, np.int32)
    samples = tuple(Sample(tokens=none, logprobs=none, finish_reason="stop", text=text) for text in texts)
    scorer = Scorer(list(stage.rewards), RECIPES, "fail")
    try:
        scored = scorer.score(Group(step=0, index=0, prompt=none, row=row, samples=samples))
    finally:
        scorer.close()
    assert [s.reward for s in scored.samples] == [1.0, 0.0, 0.0, 0.0]


def run_offline(recipe: str, rows: list[Any], model: Path, root: Path, *more: str) -> tuple[RunDir, dict[str, Any]]:
    """A shipped recipe of one offline stage, two steps long, on a few rows."""
    (root / "rows.json").write_text(json.dumps(rows))
    small = {"steps": 2, "workers": 1, "batch_size": 4, "micro_batch_size": 2}
    places = [f"model.path={model}", f"stages.0.data.path={root / 'rows.json'}", "serve=null"]
    done, summary = run(
        f"{recipe}.yaml", root, *places, *(f"stages.0.{key}={value}" for key, value in small.items()), *more
    )
    assert summary["status"] == "succeeded"
    assert [s["steps"] for s in summary["stages"]] == [2]
    assert np.isfinite([m["loss"] for m in done.all_metrics()]).all()
    return done, summary


@pytest.mark.parametrize(
    ("recipe", "file"),
    [
        ("alpaca-sft", "sft/alpaca_en_demo.json"),
        ("dpo", "preference/dpo_en_demo.json"),
        ("kto", "preference/kto_en_demo.json"),
        ("orpo", "preference/dpo_en_demo.json"),
        ("simpo", "preference/dpo_en_demo.json"),
        ("distill", "sft/alpaca_en_demo.json"),
    ],
)
def test_an_offline_recipe_trains_on_real_rows(
    recipe: str, file: str, shared_data: Path, tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    short = sorted(json.loads((shared_data / file).read_text()), key=lambda row: len(json.dumps(row)))[:8]
    teacher = [f"stages.0.teacher.path={tiny_model}"] if recipe == "distill" else []  # a byte is a token here
    done, summary = run_offline(recipe, short, tiny_model, tmp_path, *teacher)
    tensors, _ = load_adapter(done / "adapters" / summary["weights"]["digest"])
    moved = any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert moved or recipe == "distill", "a teacher that is the student teaches nothing"


def test_a_process_reward_recipe_trains_on_the_steps_of_real_solutions(
    shared_data: Path, tiny_model: Path, ray_session: str, tmp_path: Path
) -> None:
    """GSM8K's solutions have a step a line; every second one is made wrong at its last step."""
    lines = [json.loads(line) for line in (shared_data / "gsm8k/train.jsonl").open()]
    rows = []
    for n, line in enumerate(sorted(lines, key=lambda line: len(line["question"] + line["answer"]))[:8]):
        steps = line["answer"].splitlines()[:-1]
        labels = [True] * (len(steps) - 1) + [n % 2 == 0]
        rows.append({"prompt": line["question"], "completions": steps, "labels": labels})
    done, summary = run_offline("process-reward", rows, tiny_model, tmp_path)
    config = json.loads((done / "models/0-process_reward_model/config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert summary["weights"]["digest"] == base_digest(done / "models/0-process_reward_model")
