"""What passes from step to step: prompts drawn, and Ziegler's controller of the KL's coefficient."""

from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed
from raylign.rollout.records import Group, Sample
from raylign.trainers.online.checkpoints import Checkpoint
from raylign.trainers.online.progress import Progress, adapted, completion_kl
from raylign.trainers.stages import AdaptiveKl, OnlineStage

RULE = AdaptiveKl(target=6.0, horizon=1000)


def group(*logprobs: float, reference: float | None) -> Group:
    """A group with a completion of two tokens for each log-prob."""
    samples = tuple(
        Sample(
            tokens=np.zeros(2, np.int32),
            logprobs=np.full(2, p, np.float32),
            finish_reason="stop",
            reference=None if reference is None else np.full(2, reference, np.float32),
        )
        for p in logprobs
    )
    return Group(step=0, index=0, prompt=np.zeros(1, np.int32), row={}, samples=samples)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 0.128)),
        (60.0, 0.1 * (1 + 0.2 * 0.128)),  # the error counts 20 % at most
        (0.0, 0.1 * (1 - 0.2 * 0.128)),
    ],
)
def test_the_coefficient_follows_the_kl(measured: float, expected: float) -> None:
    assert adapted(0.1, measured, 128, RULE) == pytest.approx(expected, rel=1e-12)


def test_the_kl_of_completions_by_hand() -> None:
    # two completions of two tokens: 2 · (−1 + 1.5) and 2 · (−2 + 1.5)
    assert completion_kl([group(-1.0, -2.0, reference=-1.5)]) == pytest.approx(0.0)
    assert completion_kl([group(-1.0, reference=-1.5), group(-0.5, reference=-1.5)]) == pytest.approx(1.5)
    assert completion_kl([group(-1.0, reference=None)]) is None


def test_a_step_moves_prompts_and_coefficient() -> None:
    fields = {"data": {"path": "x"}, "rewards": [{"type": "format", "pattern": "x"}], "batch_size": 128}
    fixed = OnlineStage.model_validate(fields | {"kl": {"coefficient": 0.1}})
    moving = OnlineStage.model_validate(
        fields | {"kl": {"coefficient": 0.1, "adaptive": {"target": 2.0, "horizon": 1000}}}
    )
    groups = [group(-1.0, reference=-2.1)]  # a KL of 2.2, ten percent too much
    start = Progress.at_start(fixed)
    assert start == Progress(drawn=0, kl_coefficient=0.1)
    assert start.after(16, groups, fixed).after(20, groups, fixed) == Progress(drawn=36, kl_coefficient=0.1)
    assert start.after(16, groups, moving).kl_coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.128))
    assert start.after(16, [], moving).kl_coefficient == 0.1
    assert Progress.at_start(OnlineStage.model_validate(fields)).kl_coefficient == 0


def test_a_checkpoint_from_before_there_was_any_is_refused(tmp_path: Path):
    whole = Checkpoint(tmp_path, 3, {"progress": {"drawn": 24, "kl_coefficient": 0.02}})
    assert Progress.of(whole) == Progress(drawn=24, kl_coefficient=0.02)
    with pytest.raises(RunFailed, match="an older raylign wrote it; begin another run with --name"):
        Progress.of(Checkpoint(tmp_path, 3, {"version": 3}))
