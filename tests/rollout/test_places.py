"""Where actors may stand, and whom it moves when others go."""

from typing import Any

import pytest
from raylign.cluster.errors import DoesNotFit
from raylign.cluster.placement import ANYWHERE, Bounds
from raylign.cluster.planning import Demand, Offer
from raylign.rollout.places import Places


def only(node: str) -> Bounds:
    return Bounds(only=frozenset({node}))


def off(*nodes: str) -> Bounds:
    return Bounds(never=frozenset(nodes))


def places(rollout: dict[str, Any], count: int = 1, **more: Any) -> Places:
    """Of a policy with a reference beside it, and rollout workers that wish that."""
    demands = [Demand("policy", 1), Demand("reference", 1, 0.5, colocate_with="policy")]
    return Places([*demands, Demand("rollout", count, **rollout)], **more)


def test_without_wishes_anybody_may_go_anywhere() -> None:
    for made in (Places(), Places([Demand("policy", 1), Demand("rollout", 1)])):
        assert made.bounds("run/grpo/rollout-0") == made.bounds("policy-0") == ANYWHERE
        assert ANYWHERE.allow("a")


def test_roles_are_bound_to_the_plan_and_workers_to_the_wishes() -> None:
    made = places({"split_from": ("policy",)}, count=2)
    made.choose([], [Offer("a", 2), Offer("b", 2)])
    assert made.bounds("policy-0") == made.bounds("reference") == only("a")
    assert made.bounds("run/grpo/rollout-7") == off("a")
    assert [made.bounds("rollout-7").allow(node) for node in "abc"] == [False, True, True]
    assert str(made.bounds("rollout-7")) == " off a"


def test_colocated_workers_have_room_where_the_first_of_the_policy_goes() -> None:
    demands = [Demand("policy", 2), Demand("rollout", 2, colocate_with="policy")]
    made = Places(demands)
    made.choose([], [Offer("a", 2), Offer("b", 3)])
    assert [made.bounds(f"policy-{i}") for i in (0, 1)] == [only("b"), only("a")]
    assert made.bounds("rollout-0") == only("b")


def test_a_policy_that_is_started_anew_comes_back_to_those_who_stand_with_it() -> None:
    made = places({"colocate_with": "policy"})
    made.choose([], [Offer("a", 3), Offer("b", 4)])
    made.stands("rollout-0", "a")
    made.choose(["reference"], [Offer("a", 1), Offer("b", 4)])
    assert made.bounds("policy-0") == only("a")


def test_workers_hold_their_places_against_a_policy_unless_they_are_to_move() -> None:
    made = places({"split_from": ("policy",)}, count=2)
    made.choose([], [Offer("a", 2), Offer("b", 4), Offer("c", 4)])
    for i, node in enumerate("bc"):
        made.stands(f"rollout-{i}", node)
    left = [Offer("b", 3), Offer("c", 3)]  # a is gone
    assert not made.on(left, "reference")
    assert not made.settled(["reference"], left)  # the policy would go to a
    assert made.settled(["policy-0", "reference"], left)
    with pytest.raises(DoesNotFit, match=r"policy with reference does not fit.*off the nodes of rollout"):
        made.choose([], left)
    assert made.bounds("rollout-0") == off("a")
    made.choose([], left, moving=True)
    assert made.bounds("policy-0") == only("b")
    assert [made.bounds("rollout-0").allow(node) for node in "bc"] == [False, True]
    made.left("rollout-0")
    made.choose([], [Offer("b", 4), Offer("c", 3)])  # now b holds nobody up, and c still has a worker
    assert made.bounds("policy-0") == only("b")


def test_the_fewest_workers_will_do_where_there_is_no_more_room() -> None:
    made = places({"colocate_with": "policy"}, count=3, least=1)
    with pytest.raises(DoesNotFit, match="policy with reference, 3 × rollout does not fit"):
        made.choose([], [Offer("a", 2.5)])
    made.choose([], [Offer("a", 2.5)], moving=True)
    assert made.bounds("rollout-0") == only("a")


def test_who_is_there_stays_when_nobody_is_missing() -> None:
    made = places({"colocate_with": "policy"})
    made.choose([], [Offer("a", 3)])
    made.choose(["policy-0", "reference"], [])
    assert made.bounds("policy-0") == only("a")
