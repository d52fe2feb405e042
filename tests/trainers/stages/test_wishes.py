"""Where the roles of a stage wish to stand: what the planner is told, and what is refused with the recipe."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from raylign.cluster.planning import Demand, Offer, plan
from raylign.trainers.stages import OnlineStage
from raylign.trainers.stages.wishes import role_demands


def stage(**fields: Any) -> OnlineStage:
    return OnlineStage.model_validate(
        {"data": {"path": "x"}, "rewards": [{"type": "format", "pattern": "x"}], "kl": {}, **fields}
    )


def test_wishes_reach_the_planner() -> None:
    made = stage(
        type="ppo",
        critic={"resources": {"split_from": "policy"}},
        reference={"cpus": 0.5, "colocate_with": "policy"},
        scoring={"workers": 3, "resources": {"colocate_with": "reference"}},
        rollout={"workers": 2, "resources": {"gpus": 1, "split_from": ["policy", "critic"]}},
    )
    assert role_demands(made.roles) == [
        Demand("policy", 1),
        Demand("critic", 1, split_from=("policy",)),
        Demand("reference", 1, 0.5, colocate_with="policy"),
        Demand("reward", 3, colocate_with="reference"),
        Demand("rollout", 2, 1, 1, split_from=("policy", "critic")),
    ]


def test_a_stage_without_wishes_asks_for_room_alone() -> None:
    assert role_demands(stage(kl=None).roles) == [Demand("policy", 1), Demand("reward", 1, 0.5), Demand("rollout", 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reference": {"colocate_with": "polcy"}},
            "reference.colocate_with 'polcy': there is no such role: did you mean 'policy'?",
        ),
        (
            {"scoring": {"workers": {"min": 1, "max": 2}, "resources": {"split_from": "policy"}}},
            "scoring.workers 1 to 2: where roles wish to stand together or apart, places are planned for a fixed",
        ),
        (
            {"scoring": {"resources": {"split_from": "judge"}}},
            "scoring.resources.split_from 'judge': there is no such role: "
            "roles are policy, critic, reference, reward, rollout",
        ),
        (
            {"reference": {"split_from": ["policy", "reference"]}},
            "reference.split_from 'reference': that is the role itself; name another, such as policy",
        ),
        (
            {"reference": {"colocate_with": "critic"}},
            "reference.colocate_with 'critic': this stage has no critic: it has policy, reference, reward, rollout",
        ),
        (  # a ring: one of its wishes is always for a role that gets its place later
            {"reference": {"colocate_with": "policy"}, "policy": {"colocate_with": "reference"}},
            "policy.colocate_with 'reference': reference gets its place after policy, so write it there: "
            "reference: {colocate_with: policy}",
        ),
        (
            {"scoring": {"resources": {"split_from": "rollout"}}},
            "write it there: rollout.resources: {split_from: reward}",
        ),
        (
            {"rollout": {"resources": {"colocate_with": "policy", "split_from": "policy"}}},
            "rollout.resources.split_from 'policy': colocate_with puts both on the node of policy; "
            "leave one of the two out",
        ),
        (
            {
                "reference": {"colocate_with": "policy"},
                "rollout": {"resources": {"colocate_with": "policy", "split_from": "reference"}},
            },
            "rollout.resources.split_from 'reference': colocate_with puts both on the node of policy",
        ),
        ({"policy": {"gpus": 1.5}}, "1.5: an actor has a part of one GPU or whole ones; take 1"),
        (
            {"policy": {"near": "reference"}},
            "unknown key 'near': known keys are cpus, gpus, labels, colocate_with, split_from",
        ),
    ],
)
def test_wishes_that_no_cluster_could_fulfil_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        stage(**fields)


def test_the_stage_of_the_readme_fits_on_nodes_that_it_splits() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (shown,) = (yaml.safe_load(t)[0] for t in re.findall(r"```yaml\n(.*?)```", text, re.S) if "colocate_with" in t)
    demands = role_demands(OnlineStage.model_validate(shown).roles)
    placed = plan(demands, [Offer("a", 2, 1), Offer("b", 8, 4)])
    nodes = {role: {a.node for a in placed if a.role == role} for role in ("policy", "reference", "reward", "rollout")}
    assert nodes == {"policy": {"a"}, "reference": {"a"}, "reward": {"b"}, "rollout": {"b"}}
