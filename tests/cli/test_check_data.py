"""`raylign check --only data`: the report as JSON and in words, and what it does not hide."""

import json
from pathlib import Path

import pytest

from .conftest import Command

RECIPE = """\
name: small
model: {{path: {model}}}
stages:
  - type: sft
    adapter: {{r: 2}}
    data: {{path: train.csv, columns: {{completion: answer}}, mixture: [{{path: more, weight: 2}}]}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(model=tiny_model))
    (tmp_path / "train.csv").write_text("prompt,answer\nwhat is the sum of two and two,4\nred,a color\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.jsonl").write_text('{"instruction": "blue", "output": "a colour"}\n')
    (tmp_path / "bench.jsonl").write_text('{"q": "What is the sum of two and two?"}\n')
    (tmp_path / "looks.py").write_text("def british(text):\n    return 'colour' if 'colour' in text else None\n")
    return path


def test_the_report_says_what_was_read_and_found(raylign: Command, recipe: Path, tmp_path: Path) -> None:
    looks = ["--against", tmp_path / "bench.jsonl", "--flag", f"{tmp_path}/looks.py:british"]
    ended = raylign("check", recipe, "--only", "data", "--near", "--json", *looks)
    assert ended.code == 0, ended.err
    (stage,) = json.loads(ended.out)["data"]
    formats = [(s["format"], s["rows"], s["taken"]) for s in stage["sources"]]
    assert formats == [("prompt_completion", 2, 2), ("alpaca", 1, 2)]
    assert stage["rows"] == 4
    found = stage["doctor"]["findings"]
    counts = {name: finding["count"] for name, finding in found.items()}
    assert counts == {"shared with bench.jsonl": 1, "british": 2, "exact_duplicate": 1}
    assert found["exact_duplicate"]["examples"][0]["row"] == 4
    assert "exact_duplicate" in raylign("check", recipe, "--only", "data").out


def test_refused_rows_end_it_with_their_number(raylign: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "more/a.jsonl").write_text('{"instruction": "blue", "output": ""}\n')
    ended = raylign("check", recipe, "--only", "data", "--json")
    assert ended.code == 2
    (stage,) = json.loads(ended.out)["data"]
    assert (stage["refused"], stage["refusals"][0]["row"]) == (2, 3)
    assert "data row 3: no supervised tokens" in ended.said
    assert "a.jsonl" in ended.said


def test_a_filter_that_fails_says_where(raylign: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text("def british(text):\n    raise KeyError(text)\n")
    ended = raylign("check", recipe, "--only", "data", "--flag", f"{tmp_path}/looks.py:british")
    assert ended.code == 2
    assert "looks.py:british failed on 'what is the sum" in ended.said
