"""Workers that find no place: the wish stands, what is missing is said, and who is there works on."""

from pathlib import Path

import pytest
from raylign.cluster.config import Resources
from raylign.cluster.errors import DoesNotFit
from raylign.cluster.placement import free_offers, place, release
from raylign.cluster.placement import offers as all_offers

from .scripted import Crew, crew, weights


def pending(prefix: str) -> list[str]:
    """Names of the placement groups that Ray, and so its autoscaler, has on its list of wishes."""
    from ray.util.placement_group import placement_group_table

    return [
        g["name"] for g in placement_group_table().values() if g["name"].startswith(prefix) and g["state"] == "PENDING"
    ]


def seen_by_the_autoscaler() -> list[dict[str, float]]:
    """What placement groups wait for as Ray's autoscaler is told it: its own request to the control store."""
    import ray
    from ray._raylet import GcsClient
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    wishes = [request for gang in state.pending_gang_resource_requests for request in gang.requests]
    return [dict(wish.resources_bundle) for wish in wishes]


def test_a_worker_too_many_stays_a_wish_until_there_is_room(ray_session: str, tmp_path: Path) -> None:
    import ray

    with crew(tmp_path, "wish", 1, cpus=1, wait_seconds=1) as made:
        made.until("all else is free", lambda: free_offers()[0].cpus == all_offers()[0].cpus - 1)
        taken = place("somebody-else", Resources(cpus=free_offers()[0].cpus), timeout=60)
        try:
            assert made.pool.scale(2) == 2
            made.until("it is said", lambda: bool(made.noted("worker_waiting")))
            (said,) = made.noted("worker_waiting")
            assert said["worker"] == "wish/rollout-1"
            assert "wish/rollout-1 asked for 1 CPU and got no place within 1 s: 127.0.0." in said["reason"]
            (wait,) = made.pool.waiting()
            assert (wait.actor, wait.node) == ("wish/rollout-1", "")
            assert wait.what.startswith("a place with 1 CPU (")
            (wish,) = pending("wish/")
            assert seen_by_the_autoscaler() == [{"CPU": 1.0}]
            assert {g.worker for g in made.step(1, 4)} == {"rollout-0"}
            assert pending("wish/") == [wish]
        finally:
            release(taken)
        made.until("it works", lambda: made.pool.size == 2)
        node = f"{ray.nodes()[0]['NodeManagerAddress']}/{ray.nodes()[0]['NodeID'][-6:]}"
        assert {m.node for m in made.pool._fleet.members.values()} == {node}


def test_no_place_for_the_least_number_of_workers_ends_the_start_and_leaves_no_wish(
    ray_session: str, tmp_path: Path
) -> None:
    made = Crew(tmp_path, "large", 1, cpus=99, wait_seconds=1)
    try:
        with pytest.raises(DoesNotFit, match=r"large/rollout-0 asked for 99 CPU and got no place within 1 s: .* free"):
            made.pool.start(weights(1), tick=lambda: None)
    finally:
        made.pool.close()
    made.until("the wish is gone", lambda: not pending("large/"))
