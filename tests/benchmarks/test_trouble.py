"""When a fault struck: as it was sent, or as what was to make an actor fail was called."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.cells import Cell
from benchmarks.trouble import moment


def test_a_fault_counts_from_when_it_struck_and_one_that_never_did_is_no_result(tmp_path: Path) -> None:
    cells = [Cell("SIGKILL", "policy", "update"), Cell("exception", "reward", "score")]
    planned = [asdict(cell) for cell in cells]
    plan = tmp_path / "plan.json"
    assert moment(planned, plan, {"number": 0, "time": 5.0}) == 5
    with pytest.raises(RuntimeError, match="exception of reward in score was prepared and never happened"):
        moment(planned, plan, {"number": 1, "time": 6.0})
    (tmp_path / "plan.json.struck").write_text(json.dumps({"number": 1, "struck": 6.5}) + "\n")
    assert moment(planned, plan, {"number": 1, "time": 6.0}) == 6.5
