"""Who scores which group, and what is said of one who fails or is late; answers come when the test gives them."""

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed, WorkerLost
from raylign.rollout.inbox import Inbox
from raylign.rollout.records import Group
from raylign.trainers.online.scoring import Scoring


def group(index: int) -> Group:
    return Group(step=3, index=index, prompt=np.array([1]), row={})


class Scorer:
    """An actor whose calls end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Group, Future[Any]]] = []
        self.score = SimpleNamespace(remote=self._score)

    def _score(self, given: Group) -> SimpleNamespace:
        future: Future[Any] = Future()
        self.asked.append((given, future))
        return SimpleNamespace(future=lambda: future)

    def answer(self) -> None:
        given, future = self.asked.pop(0)
        future.set_result(replace(given, worker="scored"))


def test_a_group_goes_to_the_scorer_with_the_fewest_and_comes_back_once() -> None:
    inbox = Inbox()
    scoring, a, b = Scoring(inbox, 60), Scorer(), Scorer()
    scoring.join("reward-0", a, "here")
    scoring.join("reward-1", b, "there")
    back: list[int] = []
    for index in range(3):
        scoring.score(group(index), lambda scored: back.append(scored.index))
    assert [g.index for g, _ in a.asked] == [0, 2]
    assert [g.index for g, _ in b.asked] == [1]
    waits = scoring.waiting("run/")
    assert [(w.what, w.actor, w.node) for w in waits] == [
        ("the reward of step 3 group 0", "run/reward-0", "here"),
        ("the reward of step 3 group 1", "run/reward-1", "there"),
    ]
    for scorer in (b, a, a):
        scorer.answer()
    inbox.take(1)
    assert back == [1, 0, 2]
    assert scoring.waiting("run/") == []
    assert scoring.failed() == {}


def test_what_a_scorer_raised_is_kept_until_it_is_replaced_and_what_it_owed_does_not_count() -> None:
    inbox = Inbox()
    scoring, old, new = Scoring(inbox, 60), Scorer(), Scorer()
    back: list[str] = []
    scoring.join("reward-0", old, "here")
    for index in range(2):
        scoring.score(group(index), lambda scored: back.append(scored.worker))
    old.asked.pop(0)[1].set_exception(RunFailed("no such column"))
    inbox.take(1)
    with pytest.raises(RunFailed, match="no such column"):
        raise scoring.failed()["reward-0"]
    scoring.leave("reward-0")
    scoring.join("reward-0", new, "here")
    old.answer()
    inbox.take(1)
    assert (back, scoring.failed()) == ([], {})
    scoring.score(group(2), lambda scored: back.append(scored.worker))
    new.answer()
    inbox.take(1)
    assert back == ["scored"]


def test_a_scorer_is_late_by_the_group_it_is_at() -> None:
    scoring = Scoring(Inbox(), 0.0)
    scoring.join("reward-0", Scorer(), "here")
    assert scoring.failed() == {}
    scoring.score(group(4), lambda _: None)
    late = scoring.failed()["reward-0"]
    assert isinstance(late, WorkerLost)
    assert str(late) == "reward-0 did not finish step 3 group 4 within 0 s"


def test_what_was_withdrawn_makes_nobody_late() -> None:
    scoring = Scoring(Inbox(), 0.5)
    scoring.join("reward-0", Scorer(), "here")
    scoring.score(group(4), lambda _: None)
    (before,) = scoring.waiting("")
    while not scoring.failed():
        pass
    scoring.withdraw()
    (after,) = scoring.waiting("")
    assert after.what == before.what
    assert after.since >= before.since + 0.4
    assert scoring.failed() == {}
