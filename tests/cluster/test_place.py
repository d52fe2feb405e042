"""Placement groups on a real Ray."""

import itertools

import pytest
from raylign.cluster.config import Resources
from raylign.cluster.errors import DoesNotFit
from raylign.cluster.placement import Bounds, free_offers, node_of, offers, place, release


def test_offers_are_the_nodes(ray_session: str) -> None:
    assert [offer.cpus for offer in offers()] == [8.0]


def test_a_place_is_taken_and_given_back(ray_session: str) -> None:
    first = place("rollout", Resources(cpus=0.25), timeout=30)
    second = place("rollout", Resources(cpus=0.25), timeout=30)
    assert first.id != second.id
    assert sum(offer.cpus for offer in free_offers()) <= 7.5
    release(first)
    release(second)


def test_a_place_lies_within_its_bounds_also_where_they_change(ray_session: str) -> None:
    here = frozenset({offers()[0].node})
    with pytest.raises(DoesNotFit, match=rf"rollout asked for 0.25 CPU off {offers()[0].node} and got no place"):
        place("rollout", Resources(cpus=0.25), timeout=0.5, bounds=lambda: Bounds(never=here))
    gone = Bounds(only=frozenset({"a node that is no more"}))
    moving = itertools.chain([gone, gone, gone], itertools.repeat(Bounds(only=here)))
    group = place("rollout", Resources(cpus=0.25), timeout=30, bounds=lambda: next(moving))
    assert {node_of(group)} == here
    release(group)


def test_no_place_is_explained_and_nothing_stays_reserved(ray_session: str) -> None:
    from ray.util import placement_group_table

    with pytest.raises(DoesNotFit, match=r"rollout asked for 99 CPU and got no place within 0.5 s: .* CPU free"):
        place("rollout", Resources(cpus=99), timeout=0.5)
    pending = [g for g in placement_group_table().values() if g["state"] in ("PENDING", "CREATED")]
    assert all(bundle.get("CPU") != 99 for g in pending for bundle in g["bundles"].values())
