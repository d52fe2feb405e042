"""Steps from older weights: which, the same whatever happens, and really made while the policy learns."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from raylign.cluster.rundir import RunDir
from raylign.trainers.recipe import load_recipe

from .conftest import RolesHere, Train
from .runs import samples, start


def versions(run: RunDir) -> list[tuple[int, set[str]]]:
    """The weight versions of each step's samples."""
    steps: dict[int, set[str]] = {}
    for step, *_, version, _ in samples(run):
        steps.setdefault(int(step), set()).add(version)
    return sorted(steps.items())


def table(run: RunDir) -> list[dict[str, Any]]:
    """All samples with all that was written of them."""
    return [row for path in sorted((run / "samples").glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def left(run: RunDir) -> str:
    return run.events("weights")[-1]["digest"]


def trouble(run: RunDir, done: int) -> None:
    """A worker dies in the middle of the second step, and the run is stopped after the third."""
    import ray

    if done == 1:
        for name in ray.util.list_named_actors():
            if name.startswith("here/rollout-"):
                ray.kill(ray.get_actor(name))
                break
    run.desire(stop=done == 3)


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_step_comes_from_its_version_for_any_workers_a_death_and_a_resume(train_here: Train, staleness: int) -> None:
    fields = {"steps": 5, "staleness": staleness, "kl": "{coefficient: 0.01}"}
    alone = train_here("alone", "grpo", **fields)
    assert versions(alone) == [(t, {str(max(0, t - staleness))}) for t in range(5)]
    told = alone.all_metrics()
    for t, metrics in enumerate(told):
        assert metrics["version/min"] == metrics["version/max"] == max(0, t - staleness)
        assert metrics["staleness/mean"] == min(t, staleness)
        assert metrics["version"] == t + 1
        assert (metrics["mismatch/max"] > 1e-3) == (t > 0)  # older weights than those before the update

    run = train_here("troubled", "grpo", trouble, 2, **fields)
    assert len(run.all_metrics()) == 3
    kept = {path.name for path in (run / "checkpoints/step-000003").glob("version-*")}
    assert kept == {f"version-{v:06d}.safetensors" for v in range(max(0, 3 - staleness), 3)}
    run.desire(stop=False)
    train_here("troubled", "grpo", workers=2, **fields)
    assert samples(run) == samples(alone)
    assert left(run) == left(alone)


@pytest.mark.parametrize(
    ("algorithm", "fields"),
    [
        ("grpo", {"staleness": 1, "partial_tokens": 4, "kl": "{coefficient: 0.01}"}),
        ("dapo", {"partial_tokens": 7, "rewards": '[{type: function, path: "rewards.py:rare"}]'}),
    ],
)
def test_partial_rollouts_are_the_same_for_any_workers_a_death_and_a_resume(
    train_here: Train, algorithm: str, fields: dict[str, Any]
) -> None:
    """A group is trained on in the step in which its last completion ends, each part from that step's weights."""
    fields = {"steps": 5, **fields}
    budget, staleness = fields["partial_tokens"], fields.get("staleness", 0)
    alone = train_here("alone", algorithm, **fields)
    rows, told = table(alone), alone.all_metrics()
    assert max(len(row["spans"]) for row in rows) == -(-12 // budget)
    for row in rows:
        spans = row["spans"]
        assert [s["tokens"] for s in spans[:-1]] == [budget] * (len(spans) - 1)
        assert 0 < spans[-1]["tokens"] <= budget
        assert sum(s["tokens"] for s in spans) == len(row["tokens"]) == len(row["logprobs"])
        newest = max(0, row["step"] - staleness)
        assert spans[-1]["version"] <= newest == row["version"]
        for before, after in itertools.pairwise(spans):
            assert after["version"] - before["version"] in ((1,) if before["version"] else (0, 1))
    assert told[0]["samples/trained"] == 0  # a random model does not stop so early
    groups = Counter((row["step"], row["group"]) for row in rows)
    assert set(groups.values()) == {8}
    drawn, unfinished = sum(m["groups/drawn"] for m in told), told[-1]["groups/carried"]
    assert len(groups) == drawn - unfinished < drawn  # none twice, none lost but those that the last step left
    assert sum(m["groups/carried"] for m in told) > unfinished
    assert max(m.get("carried", 0) for m in told) > 0

    run = train_here("troubled", algorithm, trouble, 2, **fields)
    assert len(run.all_metrics()) == 3
    assert (run / "checkpoints/step-000003/carried.safetensors").exists()
    run.desire(stop=False)
    train_here("troubled", algorithm, workers=2, **fields)
    assert samples(run) == samples(alone)
    assert left(run) == left(alone)


def test_dynamic_sampling_ahead_draws_the_same_prompts_on_resume(train_here: Train) -> None:
    fields = {
        "steps": 4,
        "staleness": 1,
        "rewards": '[{type: function, path: "rewards.py:rare"}]',
        "checkpoint_every": 4,
    }
    alone = train_here("alone", "dapo", **fields)
    drawn = [int(m["groups/drawn"]) for m in alone.all_metrics()]
    assert max(drawn) > 4
    run = train_here("stopped", "dapo", lambda run, done: run.desire(stop=done == 2), **fields)
    state = json.loads((run / "checkpoints/step-000002/state.json").read_text())
    assert state["progress"]["drawn"] == sum(drawn[:2])
    run.desire(stop=False)
    train_here("stopped", "dapo", workers=2, **fields)
    assert samples(run) == samples(alone)
    assert left(run) == left(alone)


class HeldUpdates(RolesHere):
    """Roles whose updates wait, each in a thread, until a group of the step `ahead` of it is scored."""

    ahead = 1
    seen: list[int]

    def update(self, samples: Any, step: int, kl_coefficient: float, *, tick: Callable[[], None]) -> dict[str, float]:
        self.seen = getattr(self, "seen", [])
        wanted = min(step + self.ahead, self._stage.steps - 1)
        result: Future[Any] = ThreadPoolExecutor(1).submit(self._hold, wanted)
        self._actors.answers(["policy-0"], "the hold", tick, [SimpleNamespace(future=lambda: result)])
        return super().update(samples, step, kl_coefficient, tick=tick)

    def score(self, group: Any, then: Callable[[Any], None]) -> None:
        super().score(group, then)
        self.seen = [*getattr(self, "seen", []), group.step]

    def _hold(self, step: int) -> None:
        give_up = time.monotonic() + 60
        while step not in self.seen:
            assert time.monotonic() < give_up, f"no group of step {step} came during the update before it"
            time.sleep(0.01)


def test_the_next_step_is_generated_while_the_policy_learns(train_here: Train) -> None:
    run = train_here("ahead", "grpo", steps=4, staleness=1, roles_here=HeldUpdates)
    assert len(run.all_metrics()) == 4
    assert left(run) == left(train_here("free", "grpo", steps=4, staleness=1))


def test_a_policy_that_dies_makes_the_steps_again_from_the_same_older_weights_and_tokens(
    train_here: Train, tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path
) -> None:
    import ray

    fields = {"steps": 6, "staleness": 1, "partial_tokens": 5, "checkpoint_every": 2, "kl": "null"}
    path = tiny_grpo("dies", **{f"stages__0__{key}": value for key, value in fields.items()})
    undisturbed = train_here("undisturbed", "grpo", **fields)

    def kill(run: RunDir, done: int) -> None:
        if done == 5 and not run.events("role_lost"):
            ray.kill(ray.get_actor("dies/grpo/policy-0"))

    run, summary = start(load_recipe(path), tmp_path, kill)
    assert summary["status"] == "succeeded"
    assert [e["step"] for e in run.events("role_lost")] == [5]
    (resumed,) = run.events("resumed")
    assert resumed["step"] in (2, 4)  # the checkpoint of step 4 may be on its way still
    assert summary["weights"]["digest"] == left(undisturbed)
    assert samples(run) == samples(undisturbed)
