"""Scorers that come and go while groups are scored; they are up, and answer, when the test says so."""

from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from raylign.cluster.config import ElasticWorkers
from raylign.cluster.errors import RunFailed
from raylign.rollout.inbox import Inbox
from raylign.rollout.records import Group
from raylign.trainers.online import scorers as module
from raylign.trainers.online.scorers import Coming, Scorers
from raylign.trainers.online.scoring import Scoring

from .test_scoring import Scorer


def call() -> tuple["Future[Any]", Any]:
    future: Future[Any] = Future()
    return future, SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: future))


class Actor(Scorer):
    """A scorer that is up, and says what it has counted, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.__ray_ready__ = call()
        self.done, self.counters = call()


class Stage:
    """Scorers within bounds, and who is started and ended for them."""

    def __init__(self, low: int, high: int, start: int) -> None:
        self.inbox, self.notes = Inbox(), []
        self.scoring = Scoring(self.inbox, 60)
        self.asked: dict[str, Actor] = {}
        self.ended: list[str] = []
        self.placeless: set[str] = set()
        bounds = ElasticWorkers(min=low, max=high, start=start)
        self.scorers = Scorers(bounds, self, self.scoring, self.inbox, lambda kind, **_: self.notes.append(kind))
        for name in self.scorers.missing():
            self.asked[name] = Actor()
            self.scorers.join(name, self.asked[name], "here")
        self.scorers.steady = True

    def ask_for_scorer(self, name: str) -> Coming:
        self.asked[name] = Actor()
        return Coming(self.asked[name], name)

    def keep(self, name: str, coming: Coming) -> str:
        assert coming.placement == name
        return "there"

    def stands(self, coming: Coming) -> bool:
        return coming.placement not in self.placeless

    def give_up(self, coming: Coming) -> None:
        self.ended.append(coming.placement)

    def end_one(self, name: str) -> None:
        self.ended.append(name)
        self.scorers.gone(name)

    def hear(self) -> None:
        self.inbox.take(0)
        self.scorers.reconcile()


def score(stage: Stage, *indices: int) -> list[int]:
    back: list[int] = []
    for index in indices:
        group = Group(step=3, index=index, prompt=np.array([1]), row={})
        stage.scoring.score(group, lambda scored: back.append(scored.index))
    return back


def test_more_get_groups_once_they_are_up_and_the_newest_leave_when_they_have_finished() -> None:
    stage = Stage(1, 3, start=1)
    assert stage.scorers.scale(9) == 3
    assert list(stage.asked) == ["reward-0", "reward-1", "reward-2"]
    assert [w.actor for w in stage.scorers.waiting("run/")] == ["run/reward-1", "run/reward-2"]
    first, second, third = stage.asked.values()
    early = score(stage, 0, 1)
    assert len(first.asked) == 2
    second.up.set_result(True)
    stage.hear()
    assert (stage.scorers.count, stage.scorers.target) == (2, 3)
    back = score(stage, 2, 3)
    assert [g.index for g, _ in second.asked] == [2, 3]

    assert stage.scorers.scale(1) == 1
    assert stage.ended == ["reward-2"]  # not up yet
    third.up.set_result(True)
    back += score(stage, 4)
    assert [g.index for g, _ in first.asked] == [0, 1, 4]  # none goes to who is to leave
    second.answer()
    stage.hear()
    assert (stage.scorers.count, stage.ended, back) == (1, ["reward-2"], [2])
    before, open_calls = stage.scorers.ask_counters()
    assert (before, list(open_calls)) == (Counter(), ["reward-0"])  # of who leaves, when it has left
    second.answer()
    stage.hear()
    second.done.set_result({"errors/taste": 4.0})
    stage.hear()
    assert stage.ended == ["reward-2", "reward-1"]
    assert back == [2, 3]
    assert early == []
    before, open_calls = stage.scorers.ask_counters()  # what it has counted stays
    assert (before, list(open_calls)) == (Counter({"errors/taste": 4.0}), ["reward-0"])
    assert stage.notes == ["scorer_joined", "scorer_left"]

    stage.scorers.scale(2)
    assert list(stage.asked)[-1] == "reward-3"  # a name that Ray may still know is not used again


def test_a_start_that_fails_is_told_and_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(1, 2, start=1)
    stage.scorers.scale(2)
    stage.asked["reward-1"].up.set_exception(RunFailed("no such file"))
    stage.hear()
    assert (stage.ended, stage.notes, len(stage.asked)) == (["reward-1"], ["scorer_failed"], 2)
    later = module.time.monotonic() + 3
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    stage.hear()
    assert list(stage.asked) == ["reward-0", "reward-1", "reward-2"]


def test_who_is_lost_is_started_under_his_name_with_all_that_are_missing() -> None:
    stage = Stage(1, 3, start=2)
    stage.end_one("reward-0")
    stage.scorers.steady = False
    assert stage.scorers.missing() == ["reward-0"]
    stage.scorers.scale(3)
    assert (stage.scorers.missing(), len(stage.asked)) == (["reward-0"], 2)
    stage.scorers.join("reward-0", Actor(), "here")
    stage.scorers.steady = True
    stage.scorers.reconcile()
    assert list(stage.asked) == ["reward-0", "reward-1", "reward-2"]
    stage.scorers.close()
    assert stage.ended == ["reward-0", "reward-2"]


def test_who_hangs_on_the_way_in_or_out_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0.0))
    stage = Stage(1, 4, 2)
    stage.scorers.scale(1)
    clock[0] += module.LEAVE_SECONDS + 1
    stage.scorers.reconcile()
    assert stage.ended == ["reward-1"]
    stage.placeless.add("reward-2")
    stage.scorers.scale(2)
    for _ in range(2):  # without a place it is a wish that stands
        clock[0] += module.LOAD_SECONDS + 1
        stage.scorers.reconcile()
    stage.placeless.clear()
    stage.scorers.reconcile()
    assert stage.ended == ["reward-1"]
    clock[0] += module.LOAD_SECONDS + 1
    stage.scorers.reconcile()
    assert (stage.ended[1:], stage.notes) == (["reward-2"], ["scorer_left", "scorer_failed"])
    stage.asked["reward-2"].up.set_result(True)
    stage.hear()
    assert stage.scorers.count == 1
