"""Two runs are the same where all but their clocks are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.rundir import RunDir
from raylign.rollout.records import Group, Sample
from raylign.trainers.comparison import compare
from raylign.trainers.online.samples import write_samples


def group(completion: str) -> Group:
    tokens, logprobs = np.array([4], np.int32), np.array([-1.0], np.float32)
    sample = Sample(tokens=tokens, logprobs=logprobs, finish_reason="stop", text=completion, reward=1.0)
    row = {"prompt": [{"role": "user", "content": "1+1"}]}
    return Group(step=0, index=0, prompt=np.array([3], np.int32), row=row, samples=(sample,), version=0, digest="a")


def made(path: Path, seconds: float) -> RunDir:
    """A run of two steps with one checkpoint."""
    run = RunDir(path)
    run.path.mkdir()
    for step in range(2):
        run.metrics("grpo", step, {"reward/mean": 0.5, "seconds/update": seconds, "tokens_per_second": seconds})
    write_samples(run / "samples/grpo", 0, [group("2")])
    folder = run / "checkpoints/0-grpo/step-000002"
    folder.mkdir(parents=True)
    (folder / "policy.safetensors").write_text("weights")
    (folder / "optimizer.safetensors").write_text("moments")
    (folder / "trainer_state.json").write_text(str(seconds))
    run.write_summary({"weights": {"version": 2, "digest": "d"}, "wall_seconds": seconds})
    return run


def test_clocks_do_not_count(tmp_path: Path) -> None:
    found = compare(made(tmp_path / "a", 1.0), made(tmp_path / "b", 2.0))
    assert found.equal
    assert list(found.same.values()) == [2, 1, 2, 1]


Spoil = Callable[[RunDir], object]


@pytest.mark.parametrize(
    ("what", "where", "spoil"),
    [
        ("steps of metrics", "grpo step 1", lambda run: run.metrics("grpo", 1, {"reward/mean": 0.4})),
        ("steps of metrics", "grpo step 2", lambda run: run.metrics("grpo", 2, {"reward/mean": 0.5})),
        ("steps of samples", "grpo step 0", lambda run: write_samples(run / "samples/grpo", 0, [group("3")])),
        ("steps of samples", "grpo step 0", lambda run: write_samples(run / "samples/grpo", 0, [group("2")] * 2)),
        (
            "files of weights and optimizers",
            "0-grpo/step-000002/optimizer.safetensors",
            lambda run: (run / "checkpoints/0-grpo/step-000002/optimizer.safetensors").write_text("others"),
        ),
        ("final weights", "digest", lambda run: run.write_summary({"weights": {"version": 2, "digest": "e"}})),
    ],
)
def test_whatever_else_differs_is_named(tmp_path: Path, what: str, where: str, spoil: Spoil) -> None:
    ours, theirs = made(tmp_path / "a", 1.0), made(tmp_path / "b", 1.0)
    spoil(theirs)
    found = compare(ours, theirs)
    assert not found.equal
    assert {kind: places for kind, places in found.different.items() if places} == {what: [where]}
