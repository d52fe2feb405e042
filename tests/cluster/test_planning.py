"""Placement plans worked out by hand, and against an exhaustive search."""

import itertools
import random

import pytest
from raylign.cluster.errors import DoesNotFit
from raylign.cluster.planning import Assignment, Demand, Offer, plan


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


# ---- who stands together, and who does not


def nodes_of(demands: list[Demand], nodes: list[Offer], standing: list[Assignment] = []) -> dict[str, list[str]]:  # noqa: B006
    """Role → the nodes of its actors, by index."""
    placed = sorted([*plan(demands, nodes, standing), *standing], key=lambda a: a.index)
    return {d.role: [a.node for a in placed if a.role == d.role] for d in demands}


def test_colocated_roles_count_together() -> None:
    # the policy alone would take a, the fullest; with those who follow it, it needs 2.5 CPUs
    demands = [
        Demand("policy", 1),
        Demand("reference", 1, cpus=0.5, colocate_with="policy"),
        Demand("reward", 2, cpus=0.5, colocate_with="reference"),
    ]
    assert nodes_of(demands, [Offer("a", 2), Offer("b", 3)]) == {
        "policy": ["b"],
        "reference": ["b"],
        "reward": ["b", "b"],
    }


def test_split_roles_share_no_node_whoever_of_them_says_so() -> None:
    for first, second in (("policy", "rollout"), ("rollout", "policy")):
        demands = [Demand("policy", 1, split_from=("rollout",) * (first == "policy")), Demand("reward", 1)]
        demands += [Demand("rollout", 2, split_from=("policy",) * (second == "policy"))]
        found = nodes_of(demands, [Offer("a", 2), Offer("b", 2)])
        assert found["policy"] == found["reward"]
        assert {*found["policy"], *found["rollout"]} == {"a", "b"}


def test_a_role_that_others_name_leaves_the_node_that_they_need() -> None:
    demands = [Demand("policy", 1), Demand("rollout", 1, cpus=2, split_from=("policy",))]
    # a has no GPU and so would be the policy's first choice, but the workers have room nowhere else
    assert nodes_of(demands, [Offer("a", 2), Offer("b", 1, 1)]) == {"policy": ["b"], "rollout": ["a"]}


def test_the_first_of_several_actors_is_the_one_that_is_followed() -> None:
    demands = [Demand("policy", 2, cpus=2), Demand("reference", 1, cpus=1, colocate_with="policy")]
    found = nodes_of(demands, [Offer("a", 2), Offer("b", 3)])
    assert found == {"policy": ["b", "a"], "reference": ["b"]}


def test_no_actor_of_a_split_role_stands_where_any_of_the_other_does() -> None:
    demands = [Demand("policy", 2), Demand("rollout", 3, split_from=("policy",))]
    found = nodes_of(demands, [Offer("a", 2), Offer("b", 2), Offer("c", 1)])
    assert not set(found["policy"]) & set(found["rollout"])


def test_colocated_roles_share_a_gpu_and_parts_lie_on_one_device() -> None:
    share = [Demand("policy", 1, 1, 0.6), Demand("reference", 1, 1, 0.4, colocate_with="policy")]
    assert nodes_of(share, [Offer("a", 2, 1), Offer("b", 8)]) == {"policy": ["a"], "reference": ["a"]}
    three = [Demand("rollout", 3, 1, 0.6)]  # 1.8 of 2 GPUs, but a device has room for one of them
    with pytest.raises(DoesNotFit, match=r"rollout 3 of 3 does not fit.*3 × 1 CPU \+ 0.6 GPU.*\(3 CPU \+ 1.8 GPU"):
        plan(three, [Offer("a", 8, 2)])
    assert len(plan(three, [Offer("a", 8, 2), Offer("b", 1, 1)])) == 3
    assert len(plan([Demand("policy", 1, 1, 2), Demand("rollout", 4, 1, 0.5)], [Offer("a", 8, 4)])) == 5


def test_who_stands_stays_and_the_others_follow() -> None:
    demands = [Demand("policy", 1), Demand("reference", 1, colocate_with="policy"), Demand("reward", 1)]
    demands += [Demand("rollout", 1, split_from=("policy",))]
    offers = [Offer("a", 1), Offer("b", 3)]
    stands = [Assignment("policy", 0, "b"), Assignment("reward", 0, "b")]
    assert nodes_of(demands, offers, stands) == {k: ["b"] for k in ("policy", "reference", "reward")} | {
        "rollout": ["a"]
    }
    stands = [Assignment("reference", 0, "b"), Assignment("rollout", 0, "a")]  # the policy comes back to its follower
    assert nodes_of(demands, offers, stands)["policy"] == ["b"]
    gone = [Assignment("reference", 0, "gone")]  # a node that is no more binds nobody
    assert nodes_of(demands[:2], offers, gone)["policy"] == ["b"]


@pytest.mark.parametrize(
    ("demands", "nodes", "message"),
    [
        (
            [Demand("policy", 1, 2), Demand("reward", 2, 1, colocate_with="policy")],
            [Offer("a", 3), Offer("b", 3)],
            "policy with 2 × reward does not fit; asked: policy 1 × 2 CPU, reward 2 × 1 CPU colocated with policy "
            "(4 CPU in all); cluster: a has 3 CPU; b has 3 CPU. colocated they need a node with 4 CPU and none is "
            "large enough: lower their resources, leave out a colocate_with, or add a larger node",
        ),
        (
            [Demand("policy", 1), Demand("rollout", 1, split_from=("policy",))],
            [Offer("a", 8)],
            "rollout 1 of 1 does not fit; asked: policy 1 × 1 CPU, rollout 1 × 1 CPU split from policy (2 CPU in all); "
            "cluster: a has 8 CPU. split_from keeps rollout off the nodes of policy and there is one node only: leave "
            "it out, or run on a cluster of several nodes",
        ),
        (
            [Demand("policy", 1), Demand("rollout", 3, split_from=("policy",))],
            [Offer("a", 2), Offer("b", 2)],
            "rollout 3 of 3 does not fit; asked: policy 1 × 1 CPU, rollout 3 × 1 CPU split from policy (4 CPU in all); "
            "cluster: a has 2 CPU; b has 2 CPU. off the nodes of policy: leave split_from out, ask for fewer rollout "
            "actors or smaller resources, add nodes, or for a local Ray raise cluster.cpus",
        ),
    ],
)
def test_wishes_that_no_node_fulfils_are_explained(demands: list[Demand], nodes: list[Offer], message: str) -> None:
    with pytest.raises(DoesNotFit) as error:
        plan(demands, nodes)
    assert str(error.value) == message


def problem(draw: random.Random) -> tuple[list[Demand], list[Offer]]:
    """Some roles with wishes for those before them, and a few nodes."""
    roles = sorted(draw.sample(range(5), draw.randint(2, 4)))
    names, demands = [str(role) for role in roles], []
    for place, name in enumerate(names):
        other = draw.choice(names[:place]) if place and draw.random() < 0.4 else None
        apart = tuple(n for n in names[:place] if n != other and draw.random() < 0.3)
        cpus = draw.choice([0.5, 1, 1, 2])
        demands.append(Demand(name, draw.randint(1, 2), cpus, colocate_with=other, split_from=apart))
    return demands, [Offer(node, draw.choice([1, 2, 3, 4])) for node in "abc"[: draw.randint(1, 3)]]


def contradicts(demands: list[Demand]) -> bool:
    """Whether two roles are to stand together and apart; a recipe with that is refused."""
    with_whom = {d.role: d.colocate_with for d in demands}

    def host(role: str) -> str:
        return host(other) if (other := with_whom[role]) else role

    return any(host(d.role) == host(other) for d in demands for other in d.split_from)


def holds(demands: list[Demand], nodes: list[Offer], where: dict[tuple[str, int], str]) -> bool:
    """Whether every node has room for its actors and every wish is fulfilled."""
    of = {d.role: [where[d.role, i] for i in range(d.count)] for d in demands}
    taken = {n.node: sum(d.cpus * of[d.role].count(n.node) for d in demands) for n in nodes}
    together = all(set(of[d.role]) == {of[d.colocate_with][0]} for d in demands if d.colocate_with)
    apart = all(not set(of[d.role]) & set(of[other]) for d in demands for other in d.split_from)
    return together and apart and all(taken[n.node] <= n.cpus for n in nodes)


def test_plans_fulfil_every_wish_and_hardly_miss_a_fit_that_an_exhaustive_search_finds() -> None:
    draw = random.Random(3)
    fits = missed = refused = 0
    for demands, nodes in (problem(draw) for _ in range(600)):
        if contradicts(demands):
            continue
        actors = [(d.role, i) for d in demands for i in range(d.count)]
        tries = itertools.product([n.node for n in nodes], repeat=len(actors))
        exists = any(holds(demands, nodes, dict(zip(actors, tried, strict=True))) for tried in tries)
        try:
            placed = {(a.role, a.index): a.node for a in plan(demands, nodes)}
            assert holds(demands, nodes, placed)
            fits += 1
        except DoesNotFit:
            missed += exists
            refused += not exists
    assert min(fits, refused) > 150
    assert missed <= fits / 100


SPOT, LASTING = {"ray.io/market-type": "spot"}, {"ray.io/market-type": "on-demand"}


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        ("spot", ["b", "c"]),
        ("!spot", ["a", "d"]),
        ("in(spot, on-demand)", ["a", "b", "c"]),
        ("!in(spot,on-demand)", ["d"]),
        ("spare", []),
    ],
)
def test_labels_select_nodes_as_ray_does(wanted: str, nodes: list[str]) -> None:
    offers = [Offer("a", 1, 0, LASTING), Offer("b", 1, 0, SPOT), Offer("c", 1, 0, SPOT), Offer("d", 1)]
    demand = Demand("rollout", len(nodes) or 1, labels={"ray.io/market-type": wanted})
    if not nodes:
        with pytest.raises(
            DoesNotFit, match=r"no node has the labels that rollout asks for \(ray.io/market-type spare\)"
        ):
            plan([demand], offers)
        return
    assert sorted(a.node for a in plan([demand], offers)) == nodes
    with pytest.raises(DoesNotFit):
        plan([Demand("rollout", len(nodes) + 1, labels=demand.labels)], offers)


def test_who_stands_together_needs_the_labels_of_all() -> None:
    policy = Demand("policy", 1, labels=LASTING)
    scorer = Demand("reward", 1, cpus=0.5, colocate_with="policy", labels={"disk": "ssd"})
    both = Offer("c", 2, 0, LASTING | {"disk": "ssd"})
    assert nodes_of([policy, scorer], [Offer("a", 4, 0, LASTING), both]) == {"policy": ["c"], "reward": ["c"]}


def test_a_node_that_gets_what_is_asked_for_has_every_label() -> None:
    assert plan([Demand("rollout", 1, labels=SPOT)], [Offer("new", 1, 0, None)])[0].node == "new"
