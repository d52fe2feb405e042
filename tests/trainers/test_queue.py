"""Who may begin: after other runs, by priority and arrival, when there is room."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import DoesNotFit, InputError, NotFound, RunFailed
from raylign.cluster.rundir import RunDir
from raylign.cluster.submission import Submission
from raylign.trainers.queue import Ticket, wait_for_runs, wait_for_turn


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def make(storage: Path, name: str, status: str = "starting") -> RunDir:
    run = RunDir(storage / name)
    run.path.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: {name}\n")
    run.update_status(status=status)
    return run


def free() -> None:
    """Everything fits."""


class Waiting:
    """A run that waits in a thread; `end` lets it leave the wait, as a stop would."""

    def __init__(self, run: RunDir, wait: Callable[[Callable[[], None]], None]) -> None:
        self.run, self.error = run, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(wait,), daemon=True)
        self._thread.start()

    def _work(self, wait: Callable[[Callable[[], None]], None]) -> None:
        try:
            wait(self._check)
        except BaseException as error:  # noqa: BLE001  the test looks at it
            self.error = error

    def _check(self) -> None:
        if self._stop.is_set():
            raise InterruptedError

    def end(self) -> None:
        self._stop.set()

    def over(self) -> Any:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return self.error

    def until_it_says(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in (self.run.status().get("reason") or ""):
            assert time.monotonic() < deadline, self.run.status()
            time.sleep(0.02)


def queue(run: RunDir, priority: int = 0, fits: Callable[[], None] = free, cluster: str = "c") -> Waiting:
    return Waiting(run, lambda check: wait_for_turn(run, cluster, priority, 60, fits, check))


def test_a_run_begins_after_others_have_succeeded(storage: Path) -> None:
    first, run = make(storage, "first", "running"), make(storage, "later")
    waiting = Waiting(run, lambda check: wait_for_runs(run, ["first"], check))
    waiting.until_it_says("waits for run first to succeed")
    state = run.status()
    assert (state["status"], state["waiting"][0]["what"]) == ("queued", "run first to succeed")
    first.update_status(status="succeeded")
    assert waiting.over() is None
    assert (run.status()["status"], run.status()["reason"], run.status()["waiting"]) == ("starting", "", [])


@pytest.mark.parametrize(("status", "said"), [("failed", "has failed"), ("stopped", "was stopped")])
def test_a_run_does_not_begin_after_one_that_did_not_succeed(storage: Path, status: str, said: str) -> None:
    make(storage, "first", status)
    with pytest.raises(RunFailed, match=f"run 'first' {said}, and 'later' comes after it: mend and resume"):
        wait_for_runs(make(storage, "later"), ["first"], free)


def test_names_of_no_run_and_of_itself_are_refused(storage: Path) -> None:
    run = make(storage, "later")
    with pytest.raises(NotFound, match="no run 'frist'"):
        wait_for_runs(run, ["frist"], free)
    with pytest.raises(InputError, match="cannot begin after itself"):
        wait_for_runs(run, ["later"], free)


def test_one_that_is_submitted_and_has_not_begun_is_waited_for(storage: Path) -> None:
    Submission("first", "http://127.0.0.1:1", "raylign-first-1", ("raylign-first-1",), str(storage)).save()
    run = make(storage, "later")
    waiting = Waiting(run, lambda check: wait_for_runs(run, ["first"], check))
    waiting.until_it_says("run first to succeed")
    make(storage, "first", "succeeded")
    assert waiting.over() is None


def test_the_queue_goes_by_priority_then_by_arrival_and_ends_when_places_are_taken(storage: Path) -> None:
    room = threading.Event()

    def fits() -> None:
        if not room.is_set():
            raise DoesNotFit("rollout asks for 4 CPU, 1 free")

    low, high, low2 = (make(storage, name) for name in ("low", "high", "low2"))
    first = queue(low, 0, fits)
    first.until_it_says("waits for room: rollout asks for 4 CPU, 1 free")
    third = queue(low2, 0, fits)
    third.until_it_says("its turn: 1 in the queue before it, low next")
    second = queue(high, 5, fits)
    first.until_it_says("its turn: 1 in the queue before it, high next")
    room.set()
    assert second.over() is None
    first.until_it_says("its turn: 1 in the queue before it, high next")
    high.update_status(status="running", workers={"rollout": 2})
    assert first.over() is None
    third.until_it_says("its turn: 1 in the queue before it, low next")
    low.update_status(status="failed")
    assert third.over() is None


def test_a_run_that_leaves_the_queue_and_one_whose_process_is_gone_hold_up_nobody(storage: Path) -> None:
    def never() -> None:
        raise DoesNotFit("never")

    gone = Ticket("gone", "c", 9, 1.0)
    path = storage / ".queue" / "gone.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(gone)))
    os.utime(path, (time.time() - 60, time.time() - 60))
    leaving = queue(make(storage, "leaving"), 5, never)
    leaving.until_it_says("room")
    run = queue(make(storage, "run"))
    run.until_it_says("1 in the queue before it, leaving next")
    leaving.end()
    assert isinstance(leaving.over(), InterruptedError)
    assert run.over() is None
    assert sorted(p.name for p in path.parent.glob("*.json")) == ["gone.json", "run.json"]


def test_another_cluster_has_another_queue(storage: Path) -> None:
    def never() -> None:
        raise DoesNotFit("never")

    busy = queue(make(storage, "busy"), 9, never)
    busy.until_it_says("room")
    assert queue(make(storage, "elsewhere"), 0, cluster="d").over() is None
    busy.end()
    busy.over()


def test_who_takes_places_comes_first_and_the_rest_by_priority_and_time() -> None:
    first = Ticket("a", "c", 1, 10.0)
    assert first.before(Ticket("b", "c", 0, 5.0))
    assert not first.before(Ticket("b", "c", 2, 50.0))
    assert first.before(Ticket("b", "c", 1, 11.0))
    assert replace(first, priority=-9, leaves=99.0).before(Ticket("b", "c", 9, 1.0))


@pytest.fixture
def busy_cluster(ray_session: str) -> Iterator[Callable[[], None]]:
    """The session's Ray with a quarter of a CPU left; call it to free the rest."""
    import ray
    from raylign.cluster.config import Resources
    from raylign.cluster.placement import place, release

    taken = place("somebody", Resources(cpus=ray.available_resources()["CPU"] - 0.25), timeout=60)
    let_go: list[bool] = []

    def free_it() -> None:
        if not let_go:
            let_go.append(True)
            release(taken)

    yield free_it
    free_it()


def test_a_run_with_a_priority_waits_for_a_busy_cluster_and_a_stop_ends_the_wait(
    busy_cluster: Callable[[], None], tiny_grpo: Callable[..., Path], tmp_path: Path
) -> None:
    from raylign.trainers.launch import launch
    from raylign.trainers.opening import open_run
    from raylign.trainers.recipe import load_recipe

    def run_it(name: str, then: Callable[[RunDir], None]) -> tuple[RunDir, dict[str, Any]]:
        config = load_recipe(tiny_grpo(name, stages__0__steps=1, cluster="{priority: 1, cpus: 8}"))
        run = open_run(config, tmp_path / "runs", named=True, resume=False)

        def follow() -> None:
            deadline = time.monotonic() + 120
            while run.status().get("status") != "queued" and time.monotonic() < deadline:
                time.sleep(0.05)
            then(run)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        summary = launch(config, run, lambda _: None)
        thread.join(timeout=10)
        return run, summary

    reasons: list[str] = []

    def stop(run: RunDir) -> None:
        reasons.append(run.status()["reason"])
        run.desire(stop=True)

    run, summary = run_it("stopped", stop)
    assert summary["status"] == "stopped"
    assert "waits for room: " in reasons[0]
    run, summary = run_it("waited", lambda _: busy_cluster())
    assert (summary["status"], summary["stages"][0]["steps"]) == ("succeeded", 1)
    assert [a["status"] for a in run.attempts()] == ["succeeded"]
