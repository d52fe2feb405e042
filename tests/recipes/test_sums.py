"""The quickstart's task: sums worked by hand, and held-out questions that no seed can mix into training."""

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

SUMS = Path(__file__).parents[2] / "recipes/quickstart/sums.py"
SMALL = {"documents": 300, "demonstrations": 120, "prompts": 120, "preferences": 120, "questions": 40}


@pytest.fixture(scope="module")
def sums() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sums", SUMS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (123, 456, "3+6+0=09;2+5+0=07;1+4+0=05;=579"),
        (317, 403, "7+3+0=10;1+0+1=02;3+4+0=07;=720"),
        (999, 999, "9+9+0=18;9+9+1=19;9+9+1=19;=1998"),
        (500, 500, "0+0+0=00;0+0+0=00;5+5+0=10;=1000"),
    ],
)
def test_a_sum_is_worked_column_by_column(sums: ModuleType, a: int, b: int, text: str) -> None:
    assert sums.worked(a, b) == text


def test_worked_answers_are_right_without_slips_and_often_wrong_with_them(sums: ModuleType) -> None:
    rng = random.Random(0)
    questions = [sums.draw(rng) for _ in range(2000)]
    assert all(sums.answer(sums.worked(a, b)) == str(a + b) for a, b in questions)
    right = [sums.answer(sums.worked(a, b, rng, 0.1)) == str(a + b) for a, b in questions]
    assert 0.65 < sum(right) / len(right) < 0.85  # three columns of which each slips one time in ten


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 12345])
def test_training_never_draws_a_held_out_question(sums: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    trained = {sums.draw(rng) for _ in range(5000)}
    asked = {sums.draw(rng, held=True) for _ in range(300)}
    assert not trained & asked
    assert not any(sums.held_out(a, b) for a, b in trained)


def test_prepare_writes_disjoint_files_and_one_held_out_set(sums: ModuleType, tmp_path: Path) -> None:
    sets = []
    for seed in (1, 2):
        out = tmp_path / str(seed)
        out.mkdir()
        sums.prepare(out, seed, **SMALL)
        asked = rows(out / "held_out.jsonl")
        questions = {row["prompt"] for row in asked}
        assert len(questions) == len(asked) == SMALL["questions"]
        assert all(row["answer"] == str(sum(map(int, row["prompt"].split("+")))) for row in asked)
        assert not questions & trained_on(out)
        sets.append(asked)
    assert sets[0] == sets[1]
    assert trained_on(tmp_path / "1") != trained_on(tmp_path / "2")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def trained_on(out: Path) -> set[str]:
    """Every question in any file that a stage trains on."""
    texts = [row["text"] for row in rows(out / "text.jsonl")]
    found = {match[1] for text in texts if (match := re.match(r"\n(\d+\+\d+):", text))}
    for name in ("demonstrations", "clean_demonstrations"):
        found |= {row["messages"][0]["content"] for row in rows(out / f"{name}.jsonl")}
    return found | {row["prompt"] for name in ("prompts", "preferences") for row in rows(out / f"{name}.jsonl")}


def test_a_preference_is_right_before_wrong_in_the_forms_of_a_policys_answers(sums: ModuleType, tmp_path: Path) -> None:
    sums.prepare(tmp_path, 3, **SMALL | {"preferences": 1000})
    pairs = rows(tmp_path / "preferences.jsonl")
    for pair in [*pairs, *rows(tmp_path / "held_out_preferences.jsonl")]:
        row = {"answer": str(sum(map(int, pair["prompt"].split("+"))))}
        assert sums.exact_match(pair["chosen"], row) == 1.0
        assert sums.exact_match(pair["rejected"], row) == 0.0
    for side, share in (("chosen", 0.9), ("rejected", 0.5)):
        assert abs(sum(";" in pair[side] for pair in pairs) - 1000 * share) < 70
    assert {p["prompt"] for p in rows(tmp_path / "held_out_preferences.jsonl")}.isdisjoint(trained_on(tmp_path))


def test_demonstrations_are_uneven_and_the_clean_ones_are_not(sums: ModuleType, tmp_path: Path) -> None:
    sums.prepare(tmp_path, 3, **SMALL | {"demonstrations": 1000})

    def right(name: str) -> float:
        pairs = [[m["content"] for m in row["messages"]] for row in rows(tmp_path / f"{name}.jsonl")]
        return sum(";" in reply and sums.answer(reply) == str(sum(map(int, q.split("+")))) for q, reply in pairs)

    assert right("clean_demonstrations") == 1000
    assert 200 < right("demonstrations") < 350  # 35 % worked, three quarters of them right


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7+3+0=10;1+0+1=02;3+4+0=07;=720", 1.0),
        ("=720", 1.0),
        ("=721", 0.0),
        ("7+3+0=10;=72", 0.0),
        ("=720;", 0.0),
        ("=0720", 0.0),
        ("720=", 0.0),
        ("", 0.0),
        ("user====", 0.0),
    ],
)
def test_the_reward_wants_exactly_the_answer_behind_the_last_sign(
    sums: ModuleType, completion: str, reward: float
) -> None:
    assert sums.exact_match(completion, {"answer": "720"}) == reward


def test_a_number_without_the_sign_counts_too(sums: ModuleType) -> None:
    assert sums.exact_match("720", {"answer": "720"}) == 1.0
