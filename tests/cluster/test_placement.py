"""Placement plans worked out by hand."""

import pytest
from raylign.cluster.errors import DoesNotFit
from raylign.cluster.placement import Assignment, Demand, Offer, plan


def test_everything_fits_on_one_node() -> None:
    assert plan([Demand("policy", 1), Demand("rollout", 2, cpus=0.5)], [Offer("a", 2)]) == [
        Assignment("policy", 0, "a"),
        Assignment("rollout", 0, "a"),
        Assignment("rollout", 1, "a"),
    ]


def test_large_actors_choose_first_and_small_ones_fill_up() -> None:
    placed = plan([Demand("small", 2, cpus=1), Demand("large", 1, cpus=4)], [Offer("a", 4), Offer("b", 2)])
    assert {(p.role, p.node) for p in placed} == {("large", "a"), ("small", "b")}


def test_actors_without_gpu_leave_the_gpu_node_free() -> None:
    placed = plan([Demand("reward", 1, cpus=1), Demand("policy", 1, cpus=1, gpus=1)], [Offer("g", 1, 1), Offer("c", 1)])
    assert {(p.role, p.node) for p in placed} == {("policy", "g"), ("reward", "c")}


def test_tenths_of_a_cpu_add_up() -> None:
    assert len(plan([Demand("scorer", 10, cpus=0.1)], [Offer("a", 1)])) == 10


def test_no_demand_needs_no_node() -> None:
    assert plan([], []) == []


def test_the_first_actor_too_many_is_named_with_what_there_is() -> None:
    with pytest.raises(DoesNotFit) as error:
        plan([Demand("policy", 1), Demand("rollout", 4)], [Offer("a", 2), Offer("b", 1)])
    assert str(error.value) == (
        "rollout 3 of 4 does not fit; asked: policy 1 × 1 CPU, rollout 4 × 1 CPU (5 CPU in all); "
        "cluster: a has 2 CPU; b has 1 CPU. "
        "ask for fewer rollout actors or smaller resources, add nodes, or for a local Ray raise cluster.cpus"
    )


def test_an_actor_larger_than_any_node_is_told_apart() -> None:
    with pytest.raises(DoesNotFit, match=r"policy 1 of 1 .*no node is large enough for one policy actor"):
        plan([Demand("policy", 1, cpus=3)], [Offer("a", 2), Offer("b", 2)])


def test_a_cluster_without_nodes_says_so() -> None:
    with pytest.raises(DoesNotFit, match="there is no node"):
        plan([Demand("policy", 1)], [])
