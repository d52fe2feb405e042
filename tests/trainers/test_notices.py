"""What a run stops for without being asked."""

import time
from pathlib import Path

from raylign.cluster.rundir import RunDir
from raylign.trainers.notices import Notices, deadline_of, preempted


def test_workers_may_go_with_their_node_and_what_the_run_needs_may_not() -> None:
    assert preempted({}) == ""
    assert preempted({"r/grpo/rollout-3": "10.0.0.7", "r/grpo/reward-0": "10.0.0.7"}) == ""
    draining = {"r/grpo/rollout-3": "10.0.0.7", "r/grpo/policy-0": "10.0.0.8"}
    assert preempted(draining) == "node 10.0.0.8 is going away, and r/grpo/policy-0 is there"
    assert preempted({"the controller": "10.0.0.1"}) == "node 10.0.0.1 is going away, and the controller is there"


def test_nodes_are_looked_at_now_and_then_and_the_clock_always() -> None:
    looks: list[int] = []

    def nodes() -> dict[str, str]:
        looks.append(1)
        return {}

    calm = Notices(None, nodes)
    assert [calm(), calm(), calm()] == ["", "", ""]
    assert len(looks) == 1
    late = Notices(time.time() - 1, nodes)
    assert late() == late() == "its time is over (max_hours)"


def test_a_controller_begun_again_has_no_more_time_than_the_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    first = deadline_of(run, 2.0, again=False)
    assert first is not None
    assert 7190 < first - time.time() <= 7200
    assert deadline_of(run, 2.0, again=True) == first
    later = deadline_of(run, 3.0, again=False)
    assert later is not None
    assert later > first + 3000
    assert deadline_of(run, None, again=False) is None
    assert deadline_of(run, None, again=True) is None
