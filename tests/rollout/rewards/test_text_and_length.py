"""Exact match, JSON Schema and length shaping."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from raylign.rollout.config import ExactReward, JsonSchemaReward, LengthReward
from raylign.rollout.rewards.functions import RewardError, build_reward
from raylign.rollout.rewards.length import soft_overlong

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("completion", "score"), [("72", 1.0), (" 72\n", 1.0), ("72.0", 0.0), ("", 0.0)])
def test_exact_match(completion: str, score: float) -> None:
    exact = build_reward(ExactReward(answer_after="####"), Path())
    assert exact.score(completion, {"answer": "so #### 72"}) == score


def test_exact_match_of_what_follows_a_mark() -> None:
    exact = build_reward(ExactReward(completion_after="Answer:"), Path())
    assert exact.score("Answer: 6. No. Answer: 7", {"answer": "7"}) == 1.0
    assert exact.score("7", {"answer": "7"}) == 0.0
    with pytest.raises(RewardError, match="found no column 'answer'"):
        exact.score("7", {})


@pytest.mark.parametrize(
    ("completion", "score"),
    [('{"n": 1}', 1.0), ('{"n": 0}', 0.0), ('{"n": 1, "m": 2}', 0.0), ("{n: 1}", 0.0), ('{"n": NaN}', 0.0), ("", 0.0)],
)
def test_json_schema(completion: str, score: float) -> None:
    assert build_reward(JsonSchemaReward(json_schema=SCHEMA), Path()).score(completion, {}) == score


def test_endless_nesting_is_no_json_and_no_crash() -> None:
    assert build_reward(JsonSchemaReward(json_schema=SCHEMA), Path()).score("[" * 100_000, {}) == 0.0


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "objct"}, "type: 'objct' is not valid"),
        ({"properties": {"n": {"minimum": "1"}}}, "properties.n.minimum: '1' is not of type 'number'"),
    ],
)
def test_a_wrong_schema_is_refused_in_the_recipe(schema: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=f"json_schema is no JSON Schema: {fault}"):
        JsonSchemaReward(json_schema=schema)


def test_references_are_not_fetched() -> None:
    reward = build_reward(JsonSchemaReward(json_schema={"$ref": "http://127.0.0.1:9/schema"}), Path())
    with pytest.raises(RewardError, match="Unresolvable"):
        reward.score("1", {})


@pytest.mark.parametrize(("tokens", "score"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (900, -1.0)])
def test_soft_overlong_by_hand(tokens: int, score: float) -> None:
    assert soft_overlong(tokens, LengthReward(max_tokens=100, buffer=20)) == score


def test_a_buffer_longer_than_the_whole_is_refused() -> None:
    with pytest.raises(ValidationError, match="buffer 101 is more than max_tokens 100"):
        LengthReward(max_tokens=100, buffer=101)
