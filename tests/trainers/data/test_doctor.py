"""What the data doctor finds: counted, shown, and nothing else than is there."""

import random
from pathlib import Path
from typing import Any

import pytest
from raylign.trainers.data.doctor import diagnose
from raylign.trainers.data.ngrams import Grams, strings
from raylign.trainers.data.rows import load_rows
from raylign.trainers.stages import DataConfig

LONG = "A train leaves the town at nine and comes to the sea at noon with forty people in its two cars"


def text(value: str) -> dict[str, Any]:
    return {"text": value}


def counts(*args: Any, **options: Any) -> dict[str, int]:
    return {name: finding.count for name, finding in diagnose(*args, **options).findings.items()}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "empty"),
        (text("caf\ufffd ol\ufffd"), "unreadable"),
        (text("word " * 100), "repetitive"),
        (text("the same line again\n" * 20), "repetitive"),
        (text("".join(chr(97 + i % 26) + " " * (i % 2) for i in range(100_001))), "overlong"),
    ],
)
def test_every_oddity_is_named_with_its_row(row: dict[str, Any], name: str) -> None:
    report = diagnose([text(LONG), row])
    assert report.findings[name].count == 1
    assert report.findings[name].examples[0]["row"] == 2


def test_good_rows_have_no_findings() -> None:
    report = diagnose([text("short"), text(LONG)])
    assert report.findings == {}
    assert report.lengths == {8: 1, 128: 1}


def test_copies_count_up_to_white_space_and_case() -> None:
    rows = [text(LONG), text("other"), text(LONG.upper()), text(LONG.replace(" ", "\n"))]
    found = diagnose(rows).findings["exact_duplicate"]
    assert found.count == 2
    assert [e["row"] for e in found.examples] == [3, 4]
    assert found.examples[0]["seen"].startswith("row 1: A TRAIN")


def test_near_copies_are_found_and_exact_ones_not_counted_twice() -> None:
    # 60 words have 56 shingles; another last word changes one: the similarity is 55 / 57
    words = [f"w{i}" for i in range(60)]
    near = " ".join([*words[:-1], "other"])
    far = " ".join(random.Random(0).sample(words, 60))
    rows = [text(" ".join(words)), text(far), text(near), text(" ".join(words))]
    report = diagnose(rows, near=True)
    assert {n: [e["row"] for e in f.examples] for n, f in report.findings.items()} == {
        "exact_duplicate": [4],
        "near_duplicate": [3],
    }


def test_thirteen_words_of_a_benchmark_are_found_and_twelve_are_not() -> None:
    words = LONG.split()
    grams = Grams([LONG])
    rows = [text("x " + " ".join(words[3:16]) + " y"), text(" ".join(words[3:15]) + " y")]
    assert counts(rows, against={"bench": grams}) == {"shared with bench": 1}


def test_short_questions_are_one_gram_and_shorter_ones_are_counted() -> None:
    grams = Grams(["How much is two and two?", "2+2?"])
    assert grams.short == 1
    assert grams.first_in("so how much is TWO and two, then") == "how much is two and two"
    assert grams.first_in("how much is two and three") == ""


def test_filters_are_the_users_own() -> None:
    flagged = counts([text("hallo"), text("hello")], filters={"language": lambda t: "de" if t == "hallo" else None})
    assert flagged == {"language": 1}


def test_the_test_set_in_the_training_set_is_found(shared_data: Path) -> None:
    config = DataConfig(path="x", columns={"prompt": "question", "completion": "answer"})
    train = load_rows(config, shared_data / "gsm8k/train.jsonl", "messages")
    held_out = load_rows(
        DataConfig(path="x", columns={"prompt": "question"}), shared_data / "gsm8k/test.jsonl", "prompt"
    )
    grams = Grams(row["prompt"][0]["content"] for row in held_out)
    clean = counts(train, against={"test": grams})
    planted = {"messages": [held_out[7]["prompt"][0], {"role": "assistant", "content": "?"}]}
    assert (
        counts([*train, planted], against={"test": grams})["shared with test"] == clean.get("shared with test", 0) + 1
    )
    assert set(strings({"a": ["b", {"c": "d"}], "e": 1})) == {"b", "d"}
