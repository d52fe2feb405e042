"""The scorer: parts, sums, and what an error does to its group."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.rollout.config import (
    FormatReward,
    FunctionReward,
    HttpReward,
    JudgeReward,
    LengthReward,
    MathReward,
    RewardConfig,
)
from raylign.rollout.records import Group, Sample
from raylign.rollout.rewards.scorer import OnError, Scorer, groups_at_once
from raylign.trainers.recipe import load_recipe
from raylign.trainers.stages import OnlineStage

from .http_service import Handler, serving

SOURCE = """
import pathlib, time
def exact(completion, row):
    return 1.0 if completion == row["answer"] else 0.0
def after(completion, row):
    while not pathlib.Path(row["mark"]).exists():
        time.sleep(0.01)
    return 1.0
def moody(completion, row):
    return {"none": None, "nan": float("nan"), "text": "1.0"}.get(completion, 1.0)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(SOURCE)
    return tmp_path


def group(*texts: str) -> Group:
    samples = tuple(
        Sample(tokens=np.array([1], np.int32), logprobs=np.zeros(1, np.float32), finish_reason="stop", text=t)
        for t in texts
    )
    return Group(step=3, index=5, prompt=np.array([1], np.int32), row={"answer": "7"}, samples=samples)


def rewards() -> list[RewardConfig]:
    return [FunctionReward(path="rewards.py:exact"), FormatReward(pattern=r"\d", weight=0.1)]


def test_samples_get_parts_and_their_weighted_sum(root: Path) -> None:
    scorer = Scorer(rewards(), root)
    scored = scorer.score(group("7", "8", "seven"))
    assert [s.reward for s in scored.samples] == pytest.approx([1.1, 0.1, 0.0])
    assert scored.samples[1].reward_parts == {"exact": 0.0, "format": 1.0}
    assert scored.error is None
    assert list(scorer.counters()) == ["seconds", "seconds/exact", "seconds/format"]
    scorer.close()


@pytest.mark.parametrize("text", ["none", "nan", "text"])
def test_fail_names_reward_step_group_and_value(root: Path, text: str) -> None:
    scorer = Scorer([FunctionReward(path="rewards.py:moody")], root, "fail")
    with pytest.raises(RunFailed, match=r"reward 'moody' gave .* at step 3, group 5, completion 1: ") as caught:
        scorer.score(group("fine", text))
    assert "\n" not in str(caught.value)
    scorer.close()


@pytest.mark.parametrize(
    ("on_error", "error", "parts"),
    [("drop", "reward 'moody' gave None", [{}, {}]), ("zero", None, [{"moody": 1.0}, {"moody": 0.0}])],
)
def test_drop_marks_the_group_and_zero_scores_it(
    root: Path, on_error: OnError, error: str | None, parts: list[dict[str, float]]
) -> None:
    scorer = Scorer([FunctionReward(path="rewards.py:moody")], root, on_error)
    scored = scorer.score(group("fine", "none"))
    assert (scored.error or "").startswith(error or "")
    assert [s.reward_parts for s in scored.samples] == parts
    counters = scorer.counters()
    assert counters["errors/moody"] == 1
    assert counters.get("dropped", 0) == (on_error == "drop")
    scorer.close()


def test_hanging_regular_expression_is_an_error_within_its_time(root: Path) -> None:
    scorer = Scorer([FormatReward(pattern="(a+)+b", timeout_seconds=0.5)], root, "drop")
    scored = scorer.score(group("a" * 60))
    assert scored.error is not None
    assert "took longer than 0.5 s" in scored.error
    assert scorer.counters()["overruns/format"] == 1
    scorer.close()


def test_endless_expression_is_a_wrong_answer_and_counted(root: Path) -> None:
    scorer = Scorer([MathReward(timeout_seconds=1.0)], root, "fail")
    scored = scorer.score(group("\\boxed{10^{10^{10}}}", "\\boxed{7}"))
    assert [s.reward for s in scored.samples] == [0.0, 1.0]
    counters = scorer.counters()
    assert counters["overruns/math"] == 1
    assert "errors/math" not in counters
    scorer.close()


def test_entries_that_do_not_load_are_refused_at_once(root: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'exact'"):
        Scorer([*rewards(), FunctionReward(path="rewards.py:exat")], root)
    with pytest.raises(InputError, match="two rewards"):
        Scorer([*rewards(), *rewards()], root)


def test_scorer_is_an_actor_and_its_processes_end_with_it(root: Path, ray_session: str) -> None:
    import psutil
    import ray

    actor: Any = ray.remote(Scorer).options(num_cpus=0.1).remote(rewards(), root, "fail")
    scored: Any = ray.get(actor.score.remote(group("7", "8")), timeout=120)
    assert [s.reward for s in scored.samples] == pytest.approx([1.1, 0.1])
    with pytest.raises(RunFailed, match=r"reward 'exact' raised KeyError: 'answer' .* at step 3, group 5"):
        ray.get(actor.score.remote(dataclasses.replace(group("7"), row={})), timeout=60)
    pid: Any = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    children = psutil.Process(pid).children()
    assert len(children) == 2
    ray.kill(actor)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_a_judge_is_asked_before_others_are_waited_for(root: Path) -> None:
    """A function that comes first in the recipe ends only once the judge has been asked; the parts add up."""
    mark = root / "asked"

    def judge(handler: Handler, body: Any) -> None:
        mark.touch()
        handler.reply({"choices": [{"message": {"content": "Score: 5"}}]})

    with serving(judge) as service:
        given = {"url": service.url, "model": "m", "principles": ["Be right."], "question": "answer", "weight": 2.0}
        remote = JudgeReward.model_validate(given | {"allow_private": True})
        after = FunctionReward(path="rewards.py:after")
        scorer = Scorer([after, LengthReward(max_tokens=2, buffer=2), remote], root)
        asked = group("7", "8")
        scored = scorer.score(dataclasses.replace(asked, row={**asked.row, "mark": str(mark)}))
        assert [s.reward for s in scored.samples] == pytest.approx([1 - 0.5 + 1.0] * 2)
        assert set(scorer.counters()) == {"seconds", "seconds/after", "seconds/length", "seconds/judge"}
        scorer.close()


def test_errors_of_a_judge_go_the_way_the_recipe_says(root: Path) -> None:
    with serving(lambda handler, body: handler.reply({}, 500)) as service:
        judge = JudgeReward(
            url=service.url, model="m", principles=["x"], question="answer", allow_private=True, retries=0
        )
        for on_error, error in (("drop", "reward 'judge' was answered 500"), ("zero", None)):
            scorer = Scorer([judge], root, on_error)
            scored = scorer.score(group("7"))
            assert (scored.error or "").startswith(error or "")
            assert scorer.counters()["errors/judge"] == 1
            assert scorer.counters()["status_500/judge"] == 1
            scorer.close()


def test_groups_at_once_give_the_most_concurrent_reward_enough_to_do() -> None:
    judge = HttpReward(url="http://example.org", concurrency=64)
    assert groups_at_once([*rewards(), judge], 8) == 8
    assert groups_at_once([judge], 48) == 2
    assert groups_at_once(rewards(), 8) == 1


def test_gsm8k_recipe_scores_real_rows(shared_data: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[3] / "recipes" / "gsm8k-grpo.yaml")
    stage = recipe.stages[0]
    assert isinstance(stage, OnlineStage)
    with (shared_data / "gsm8k" / "train.jsonl").open() as file:
        rows = [json.loads(line) for line in itertools.islice(file, 20)]
    scorer = Scorer(stage.rewards, Path("/"), stage.scoring.on_error)
    for row in rows:
        right = row["answer"].rpartition("#### ")[2]
        scored = scorer.score(
            dataclasses.replace(group(f"So \\boxed{{{right}}}", "\\boxed{-1}", "I do not know."), row=row)
        )
        assert [s.reward for s in scored.samples] == [1.0, 0.0, 0.0]
    scorer.close()
