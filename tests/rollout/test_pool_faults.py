"""What becomes of a step while its workers die, hang, raise, lie or are slow: real processes, real signals."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylign.cluster.errors import RunFailed

from .scripted import Crew, crew, in_turn


@pytest.fixture(scope="module")
def three(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Three workers, for all tests here that leave three behind."""
    with crew(tmp_path_factory.mktemp("three"), "three", 3) as made:
        yield made


@pytest.fixture
def trio(three: Crew) -> Crew:
    """The three, complete and without notes of former tests."""
    three.until("three work", lambda: three.pool.size == 3)
    three.notes.clear()
    return three


def workers(made: Crew) -> list[str]:
    """The names of those that work, the oldest first."""
    return [m.name.removeprefix(made.prefix) for m in made.pool._fleet.ready()]


def test_a_worker_that_is_killed_loses_no_group_and_is_replaced(trio: Crew) -> None:
    hold, victim = trio.folder / "hold", workers(trio)[0]
    hold.touch()
    tick = in_turn(
        [
            (lambda: trio.running() == dict.fromkeys(workers(trio), 2), lambda: trio.process(victim).kill()),
            (lambda: bool(trio.noted("worker_lost")), hold.unlink),
        ]
    )
    trio.step(1, 9, tick)
    (lost,) = trio.noted("worker_lost")
    assert lost["worker"] == f"three/{victim}"
    assert len(lost["groups"]) == 2
    trio.until("it is replaced", lambda: trio.pool.size == 3)


def test_a_worker_that_dies_idle_is_missed_at_once(trio: Crew) -> None:
    victim = workers(trio)[1]
    trio.process(victim).kill()
    began = time.monotonic()
    trio.until("it is missed", lambda: bool(trio.noted("worker_lost")), seconds=20)
    assert time.monotonic() - began < 10
    assert trio.noted("worker_lost")[0]["groups"] == []
    assert victim not in workers(trio)


@pytest.mark.parametrize("fault", ["ValueError", "MemoryError", "stale"])
def test_a_group_that_raises_or_comes_from_other_weights_runs_again_elsewhere(trio: Crew, fault: str) -> None:
    (trio.folder / ("stale-2" if fault == "stale" else "raise-2")).write_text(fault)
    trio.step(2, 6)
    (lost,) = trio.noted("worker_lost")
    assert ("came back from weight version" if fault == "stale" else f"{fault}: as the script says") in lost["reason"]


def test_a_stopped_worker_is_not_waited_for_and_works_again_when_it_wakes(trio: Crew) -> None:
    hold, stopped = trio.folder / "hold", trio.process(workers(trio)[0])
    hold.touch()

    def all_run() -> bool:
        return trio.running() == dict.fromkeys(workers(trio), 2)

    def stop() -> None:
        stopped.suspend()
        hold.unlink()

    try:
        trio.step(3, 6, in_turn([(all_run, stop)]))
        assert (f"three/{workers(trio)[0]}",) in {fields["slow"] for fields in trio.noted("group_duplicated")}
        trio.publish()
        trio.step(4, 6)
        trio.publish()
    finally:
        stopped.resume()
    trio.until("it has the newest weights", lambda: {m.version for m in trio.pool._fleet.ready()} == {trio.version})
    hold.touch()
    trio.step(5, 6, in_turn([(all_run, hold.unlink)]))
    assert trio.noted("worker_lost") == []


def test_a_worker_is_given_no_groups_before_it_has_proved_the_weights(trio: Crew) -> None:
    late = workers(trio)[2]
    gate = trio.folder / f"weights-{late}"
    gate.touch()
    trio.publish()
    assert late not in {g.worker for g in trio.step(6, 12)}
    gate.unlink()
    hold = trio.folder / "hold"
    hold.touch()
    tick = in_turn([(lambda: trio.running() == dict.fromkeys(workers(trio), 2), hold.unlink)])
    assert {g.worker for g in trio.step(7, 6, tick)} == set(workers(trio))
    assert trio.noted("worker_lost") == []


def test_a_worker_that_stays_silent_or_does_not_prove_in_time_is_replaced(ray_session: str, tmp_path: Path) -> None:
    with crew(tmp_path, "hurried", 2, health_seconds=3, timeout_seconds=3) as made:
        stopped = made.process("rollout-0")
        stopped.suspend()
        made.until("it is missed", lambda: bool(made.noted("worker_lost")))
        assert "rollout-0 gave no sign of life for" in made.noted("worker_lost")[0]["reason"]
        made.until("the stopped process is gone", lambda: not stopped.is_running() or stopped.status() == "zombie")
        made.until("it is replaced", lambda: made.pool.size == 2)

        gate = tmp_path / "weights-rollout-1"
        gate.touch()
        made.publish()
        made.step(1, 4)
        made.until("it is late", lambda: len(made.noted("worker_lost")) == 2)
        assert "rollout-1 did not prove weight version 2 within 3 s" in made.noted("worker_lost")[1]["reason"]
        made.until("it is replaced", lambda: made.pool.size == 2)
        assert {m.version for m in made.pool._fleet.ready()} == {2}


def test_a_group_that_fails_everywhere_ends_the_run_with_its_error(ray_session: str, tmp_path: Path) -> None:
    (tmp_path / "always-1").touch()
    with (
        crew(tmp_path, "cursed", 1) as made,
        pytest.raises(RunFailed, match=r"step 1, group 1: failed on 4 workers, lastly: .*as the script says"),
    ):
        made.step(1, 2)


def test_steps_of_several_versions_are_under_way_at_once_and_a_death_brings_older_weights_back(trio: Crew) -> None:
    hold, held = trio.folder / "hold", workers(trio)[0]
    own = trio.folder / f"hold-{held}"
    own.touch()
    older = trio.begin(8, 6)
    trio.until("all run", lambda: trio.running() == dict.fromkeys(workers(trio), 2) or len(older.came) == 4)
    trio.publish()
    newer = trio.begin(9, 4)
    trio.until("the others go over", lambda: len(newer.came) == 4)
    assert sorted(older.ledger.counts().items()) == [
        ("carried", 0),
        ("generated", 4),
        ("pending", 0),
        ("running", 2),
        ("scored", 0),
        ("trained", 0),
    ]
    assert held not in {g.worker for g in trio.end(newer)}
    hold.touch()
    third = trio.begin(10, 8)
    trio.until("they run", lambda: sum(trio.running().values()) == 6)
    trio.process(held).kill()
    own.unlink()
    trio.until("it is missed", lambda: bool(trio.noted("worker_lost")))
    hold.unlink()
    made = trio.end(older)
    assert {(g.version, g.digest) for g in made} == {(older.ledger.version, older.ledger.digest)}
    assert {g.version for g in trio.end(third)} == {trio.version} == {older.ledger.version + 1}
    trio.until("it is replaced", lambda: trio.pool.size == 3)
