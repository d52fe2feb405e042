"""Held-out prompts while a stage learns: what they are worth, when they are asked, and what comes of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from raylign.cluster.errors import RunFailed
from raylign.cluster.rundir import RunDir
from raylign.rollout.records import Group, Sample
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.held_out import answer_metrics, pass_at
from raylign.trainers.online.metrics import advantage_metrics, repetition, time_metrics
from raylign.trainers.stages import EarlyStop, HeldOutConfig

from .conftest import Train


def group(*worth: float) -> Group:
    tokens = np.array([4, 5], np.int32)
    sample = Sample(tokens=tokens, logprobs=np.zeros(2, np.float32), finish_reason="stop")
    samples = tuple(replace(sample, reward=2 * w, reward_parts={"exact": w}) for w in worth)
    return Group(step=0, index=0, prompt=tokens, row={}, samples=samples)


def test_what_answers_are_worth() -> None:
    """Three prompts with four answers: 2, 0 and, since they could not be scored, none are right."""
    groups = [group(1, 1, 0.5, 0), group(0, 0, 0, 0), replace(group(1, 1, 1, 1), error="no reward")]
    found = answer_metrics(groups, "exact")
    assert found["reward"] == pytest.approx(5 / 12)
    assert found["reward/exact"] == pytest.approx(2.5 / 12)
    assert found["accuracy"] == pytest.approx(2 / 12)
    assert found["pass@2"] == pytest.approx((1 - 1 / 6) / 3)
    assert found["pass@4"] == pytest.approx(1 / 3)
    assert (found["length"], found["errors"]) == (2, 1)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    """Of 5 answers, 2 right: 3 of the 10 pairs have none."""
    assert pass_at(2, 5, 2) == pytest.approx(0.7)
    assert pass_at(4, 5, 2) == 1
    assert pass_at(3, 5, 0) == 0


def test_repetition_counts_what_stood_there_before() -> None:
    """1 2 1 2 1 2 has the 4-grams 1212, 2121, 1212."""
    assert repetition(np.array([1, 2, 1, 2, 1, 2], np.int32)) == pytest.approx(1 / 3)
    assert repetition(np.array([1, 2, 3, 4, 5, 6], np.int32)) == 0
    assert repetition(np.array([1, 1, 1], np.int32)) == 0


def test_advantages_and_rates_of_a_step() -> None:
    none = np.zeros(2, np.int32)
    samples = [
        TrainSample(prompt=none, tokens=none, behaviour=none, advantages=np.array(a, np.float32))
        for a in ([1, 1], [-3, 1])
    ]
    assert advantage_metrics(samples) == {
        "advantage/mean": 0,
        "advantage/std": pytest.approx(3**0.5),
        "advantage/max": 3,
    }
    assert advantage_metrics([]) == {}
    rates = time_metrics({"generate": 2.0, "update": 1.0, "publish": 1.0}, 100)
    assert rates["tokens_per_second/rollout"] == 50
    assert rates["tokens_per_second/policy"] == 100
    assert rates["tokens_per_second"] == 25


def asked(run: RunDir) -> dict[int, dict[str, float]]:
    return {e["step"]: e["metrics"] for e in run.events("held_out")}


HELD_OUT = "{path: held_out.jsonl, every: 2, samples: 4, temperature: 1.0}"


def test_prompts_are_asked_before_between_and_after_and_what_they_give_depends_on_the_weights_alone(
    train_here: Train, tmp_path: Any
) -> None:
    """Also with two workers, a stop in the middle and a resume; and the training is as without any."""
    fields = {"steps": 3, "held_out": f"{HELD_OUT[:-1]}, path: {tmp_path}/held_out.jsonl}}", "reference": "adapter_off"}
    alone = train_here("alone", "grpo", **fields)
    found = asked(alone)
    assert sorted(found) == [0, 2, 3]
    assert found[0] != found[3]
    lines = alone.all_metrics()
    assert ["held_out/reward" in m for m in lines] == [False, True, True]
    assert lines[1]["held_out/reward"] == found[2]["held_out/reward"]
    kept = pq.read_table(alone / "samples/grpo/held_out/step-000003.parquet").to_pylist()
    assert np.mean([row["reward"] for row in kept]) == pytest.approx(found[3]["held_out/reward"])
    assert {row["prompt"] for row in kept} == {"other 0", "other 1", "other 2"}

    stopped = train_here("again", "grpo", lambda run, done: run.desire(stop=done == 2), **fields)
    assert 3 not in asked(stopped)
    stopped.desire(stop=False)
    again = train_here("again", "grpo", workers=2, **fields)
    assert asked(again) == found
    plain = train_here("plain", "grpo", **(fields | {"held_out": "null"}))
    assert len({run.events("weights")[-1]["digest"] for run in (alone, again, plain)}) == 1


def test_a_stage_ends_early_with_a_checkpoint_when_held_out_prompts_gain_nothing(
    train_here: Train, tmp_path: Any
) -> None:
    """Nothing gains 100 vowels, so two measurements without end it: after the first step and the second."""
    stop = "early_stop: {patience: 2, least: 100}"
    run = train_here("early", "grpo", steps=9, held_out=f"{{path: {tmp_path}/held_out.jsonl, every: 1, {stop}}}")
    assert [m["step"] for m in run.all_metrics()] == [0, 1]
    assert [(e["stage"], e["step"]) for e in run.events("ended_early")] == [("grpo", 2)]
    assert run.events("checkpoint")[-1]["step"] == 2


def test_an_alarm_is_told_once_and_ends_a_run_that_asks_for_it(train_here: Train, tmp_path: Any) -> None:
    """All completions are cut: none of a random model ends within 12 tokens, mostly."""
    run = train_here("told", "grpo", steps=3, alarms="{window: 2}", rewards="[{type: format, pattern: never}]")
    assert [(e["alarm"], e["step"]) for e in run.events("alarm") if e["alarm"] == "no_variance"] == [("no_variance", 1)]
    assert "no_variance" in [alarm["name"] for alarm in run.status()["alarms"]]
    with pytest.raises(RunFailed, match=r"alarm no_variance at step 1: in 8 of the last 8 groups .* Try: prompts"):
        train_here(
            "stopped",
            "grpo",
            steps=3,
            alarms="{window: 2, stop: [no_variance]}",
            rewards="[{type: format, pattern: never}]",
        )


def test_what_cannot_be_measured_is_refused_with_the_recipe() -> None:
    with pytest.raises(ValidationError, match="samples 4 at temperature 0 are all the same answer"):
        HeldOutConfig(path="p", samples=4)
    with pytest.raises(ValidationError, match="'reward/mean' is not measured on held-out prompts"):
        EarlyStop(metric="reward/mean")
