"""The policy without Ray, on a tiny model: log-probs against a plain forward, gradients, and going on from a save."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.cluster.weights import joined, version_digest
from raylign.trainers.adapters import open_base
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.policy import Policy, PolicySpec
from raylign.trainers.online.scoring_model import align, completion_logprobs, logprobs_of
from raylign.trainers.stages import ALGORITHMS, OnlineStage

LENGTHS = [(5, 4), (2, 7), (9, 1), (3, 3)]
"""Tokens of prompt and completion of each sample."""


@pytest.fixture
def samples() -> list[TrainSample]:
    random = np.random.default_rng(0)
    return [
        TrainSample(
            prompt=random.integers(3, 250, prompt).astype(np.int32),
            tokens=random.integers(3, 250, completion).astype(np.int32),
            behaviour=-random.random(completion).astype(np.float32) * 6,
            advantages=np.full(completion, random.normal(), np.float32),
            reference=-random.random(completion).astype(np.float32) * 6,
        )
        for prompt, completion in LENGTHS
    ]


@pytest.fixture
def policy(tiny_model: Path) -> Callable[..., Policy]:
    """Builds a policy; options are the stage's."""

    def build(**options: object) -> Policy:
        stage = OnlineStage.model_validate(
            {
                "adapter": {"r": 4},
                "data": {"path": "none"},
                "rewards": [{"type": "format", "pattern": "x"}],
                "kl": {"coefficient": 0.1},
                "learning_rate": 1e-2,
                "warmup_steps": 0,
                **options,
            }
        )
        return Policy(PolicySpec(base=tiny_model, base_digest="", adapter=None, stage=stage, seed=1, dtype="float32"))

    return build


def _digest(policy: Policy) -> str:
    tensors, config = policy.export()
    return version_digest(joined(tensors), config, "")


def test_log_probs_are_those_of_each_row_alone(tiny_model: Path, samples: list[TrainSample]) -> None:
    model = open_base(tiny_model).eval()
    together = logprobs_of(model, samples, 0.7, 10_000, "cpu")
    one_by_one = logprobs_of(model, samples, 0.7, 1, "cpu")
    for sample, got, alone in zip(samples, together, one_by_one, strict=True):
        ids = torch.from_numpy(np.concatenate([sample.prompt, sample.tokens]).astype(np.int64))[None]
        with torch.no_grad():
            plain = (model(input_ids=ids).logits[0].float() / 0.7).log_softmax(-1)
        first = len(sample.prompt) - 1
        expected = [plain[first + t, token].item() for t, token in enumerate(sample.tokens.tolist())]
        assert got == pytest.approx(expected, abs=1e-4)
        assert alone == pytest.approx(expected, abs=1e-4)


def test_rows_line_up_with_the_positions_that_predict_them(tiny_model: Path, samples: list[TrainSample]) -> None:
    batch = align(samples, "cpu")
    assert batch.ids_BL.shape == (4, 10)
    assert batch.first == 1  # the last token of the shortest prompt
    assert batch.mask_BK.sum(1).tolist() == [completion for _, completion in LENGTHS]
    assert batch.reference_BK is not None
    for i, sample in enumerate(samples):
        at = batch.mask_BK[i] > 0
        assert batch.targets_BK[i][at].tolist() == sample.tokens.tolist()
        assert batch.behaviour_BK[i][at].tolist() == sample.behaviour.tolist()
        assert batch.reference_BK[i][at].tolist() == sample.reference.tolist()
    logprobs, entropy = completion_logprobs(open_base(tiny_model), batch, 1.0)
    assert logprobs.shape == entropy.shape == batch.targets_BK.shape
    assert logprobs.requires_grad
    assert not entropy.requires_grad


def test_samples_with_and_without_a_reference_do_not_mix(samples: list[TrainSample]) -> None:
    bare = TrainSample(
        prompt=samples[0].prompt,
        tokens=samples[0].tokens,
        behaviour=samples[0].behaviour,
        advantages=samples[0].advantages,
    )
    assert align([bare], "cpu").reference_BK is None
    with pytest.raises(ValueError, match="1 of 5 samples lack the reference's log-probs"):
        align([*samples, bare], "cpu")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_does_not_depend_on_micro_batches_and_order(
    algorithm: str, policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    norms, losses = [], []
    for tokens, order in ((1, 1), (12, -1), (10_000, 1)):
        made = policy(type=algorithm, micro_batch_tokens=tokens, entropy_bonus=0.1)
        metrics = made.update(samples[::order], 0, 0.1)
        norms.append(metrics["grad_norm"])
        losses.append(metrics["loss"])
        assert metrics["updated"] == 1.0
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_going_on_from_a_save_is_bit_equal_to_going_on(
    policy: Callable[..., Policy], samples: list[TrainSample], tmp_path: Path
) -> None:
    one = policy()
    one.update(samples, 0, 0.1)
    one.update(samples, 1, 0.1)
    one.save(tmp_path)
    other = policy()
    other.load(tmp_path)
    before = _digest(one)
    assert _digest(other) == before
    assert one.update(samples, 2, 0.1) == other.update(samples, 2, 0.1)
    assert _digest(one) == _digest(other) != before


def test_the_policy_computes_without_dropout_and_the_same_twice(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    model = policy()._model
    assert not any(module.training for module in model.modules())
    assert policy().update(samples, 0, 0.1) == policy().update(samples, 0, 0.1)
