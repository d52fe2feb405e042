"""Pairs, their statistics, the result files and the table made from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, table
from benchmarks.arena import Arena
from benchmarks.harness import Pair, limit_fraction, run_cases, run_pairs, summary
from benchmarks.measured import Case, Contest, Measured, Skipped, measure

FACTS: dict[str, Any] = {
    "machine": {"cpu": "x", "cores": 2, "memory_gb": 8, "gpu": None},
    "versions": {"torch": "2"},
    "date": "2026-01-01T00:00:00+00:00",
}
KEYS = {"case", "peer", "ratio_median", "ratio_min", "ratio_max", "pairs", "unit", "ours", "theirs", "limit_fraction"}


def took(amount: float, seconds: float, cpu_seconds: float | None = None) -> Measured:
    return Measured(amount=amount, seconds=seconds, cpu_seconds=cpu_seconds or seconds)


def contest(order: list[str] | None = None, **more: Any) -> Contest:
    """Ours does 120 in 1, 2, 3, … seconds, theirs 60 in 2."""
    order = [] if order is None else order
    return Contest(
        ours=lambda pair: order.append(f"o{pair}") or took(120, pair, 0.5 * pair),
        theirs=lambda pair: order.append(f"t{pair}") or took(60, 2),
        warm_up=lambda: order.append("w"),
        settings={},
        **more,
    )


def case(name: str, made: Contest | None = None) -> Case:
    def make(arena: Arena) -> Contest:
        if made is None:
            raise Skipped("not here")
        return made

    return Case(name=name, peer="peer", unit="tokens/s", group="g", make=make)


def test_pairs_are_interleaved_and_take_turns_in_who_begins() -> None:
    order: list[str] = []
    run_pairs(contest(order), 3, lambda text: None)
    assert order == ["w", "t1", "o1", "o2", "t2", "t3", "o3"]


def test_a_case_is_the_median_of_paired_ratios_with_its_range() -> None:
    made = contest(limit=lambda: 480.0)
    entry = summary(case("c"), made, run_pairs(made, 3, lambda text: None))
    # Ours 120, 60 and 40 a second against 30: ratios 4, 2 and 4/3; by CPU seconds twice that.
    assert (entry["ratio_median"], entry["ratio_min"], entry["ratio_max"]) == (2.0, 1.3333, 4.0)
    assert entry["ratio_cpu_median"] == 4.0
    assert (entry["ours"], entry["theirs"], entry["pairs"]) == (60.0, 30.0, 3)
    assert entry["limit_fraction"] == 0.25
    assert entry.keys() >= KEYS
    assert [pair["ours_seconds"] for pair in entry["raw"]] == [1, 2, 3]


def test_the_limit_may_be_one_of_the_ratio_or_there_may_be_none() -> None:
    pairs = [Pair(took(8, 1), took(2, 1), None)]
    assert limit_fraction(pairs, 5.0) == 0.8
    assert limit_fraction(pairs, None) is None


def test_measure_counts_wall_and_cpu_seconds() -> None:
    measured = measure(10, lambda: sum(range(200_000)))
    assert 0 < measured.cpu_seconds < 10 * measured.seconds
    assert measured.rate == 10 / measured.seconds


def test_finished_cases_are_handed_over_before_the_next_one_and_skipped_ones_say_why() -> None:
    def interrupted(pair: int) -> Measured:
        raise KeyboardInterrupt

    done: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    stopping = Contest(ours=interrupted, theirs=interrupted, warm_up=lambda: None, settings={})
    cases = [case("first", contest()), case("second"), case("third", stopping)]
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, 2, done.append, skipped.__setitem__)
    assert [entry["case"] for entry in done] == ["first"]
    assert skipped == {"second": "not here"}


def test_an_arena_makes_things_once_and_closes_them() -> None:
    made: list[str] = []
    with Arena() as arena:
        assert arena.get(made.append, "x") is arena.get(made.append, "x")
        root = arena.root
        assert root.is_dir()
    assert made == ["x"]
    assert not root.exists()


def test_a_case_measured_again_replaces_its_old_entry_and_leaves_the_others() -> None:
    entries = [{"case": name, "ratio_median": value} for name, value in [("b", 1), ("a", 2), ("b", 3)]]
    content: dict[str, Any] = {"cases": []}
    for entry in entries:
        content = results.merged(content, "rollout", FACTS, entry)
    assert [(c["case"], c["ratio_median"]) for c in content["cases"]] == [("a", 2), ("b", 3)]
    assert content["name"] == "rollout"
    assert content["cases"][0]["date"] == FACTS["date"]


def test_cases_of_another_machine_do_not_stay() -> None:
    content = results.merged({"cases": []}, "rollout", FACTS, {"case": "a"})
    other = {**FACTS, "machine": {**FACTS["machine"], "cores": 4}}
    assert [c["case"] for c in results.merged(content, "rollout", other, {"case": "b"})["cases"]] == ["b"]


def test_files_are_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    assert results.read(path) == {"cases": []}
    results.write(path, {"name": "x", "cases": [1]})
    results.write(path, {"name": "x", "cases": [2]})
    assert results.read(path) == {"name": "x", "cases": [2]}
    assert list(path.parent.iterdir()) == [path]


def test_machine_and_versions_name_what_the_numbers_depend_on() -> None:
    assert results.machine().keys() == {"cpu", "cores", "memory_gb", "gpu"}
    assert {"python", "torch", "transformers", "trl", "peft", "raylign"} <= results.versions().keys()
    json.dumps([results.machine(), results.versions()])


def test_the_table_has_a_line_a_case(tmp_path: Path) -> None:
    made = contest(limit=lambda: 480.0)
    entry = summary(case("25M-x"), made, run_pairs(made, 3, lambda text: None))
    results.write(tmp_path / "results" / "rollout.json", results.merged({"cases": []}, "rollout", FACTS, entry))
    page = table.write_table(tmp_path / "results")
    assert page == tmp_path / "README.md"
    assert "| 25M-x | **2.00** | 1.33 … 4.00 | 4.00 | 3 | 60 | 30 | tokens/s | 25% |" in page.read_text()
    assert "x, 2 cores, 8 GB, no GPU; torch 2" in page.read_text()
