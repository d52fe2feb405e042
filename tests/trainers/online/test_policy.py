"""The policy without Ray, on a tiny model: log-probs against a plain forward, gradients, and going on from a save."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.cluster.weights import joined, version_digest
from raylign.trainers.adapters import export_weights, open_base
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.losses import LossSettings, Tokens, Totals, policy_loss
from raylign.trainers.online.policy import Policy, PolicySpec
from raylign.trainers.online.prefixes import Packing
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.scoring_model import Aligned, align, completion_logprobs, logprobs_of
from raylign.trainers.stages import ALGORITHMS, OnlineStage

from .test_losses_of_trl import inputs, trainer

LENGTHS = [(5, 4), (2, 7), (9, 1), (3, 3)]
"""Tokens of prompt and completion of each sample."""


@pytest.fixture
def samples() -> list[TrainSample]:
    random = np.random.default_rng(0)
    words = random.integers(3, 250, 10).astype(np.int32)  # of which all prompts are a part: the samples share rows
    return [
        TrainSample(
            prompt=words[:prompt],
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


def whole(samples: list[TrainSample]) -> Aligned:
    """All samples in one micro-batch, a row for each."""
    return align(Packing(10_000).bundles(samples), "cpu")


def _digest(policy: Policy) -> str:
    tensors, config = policy.export()
    return version_digest(joined(tensors), config, "")


def test_log_probs_are_those_of_each_row_alone(tiny_model: Path, samples: list[TrainSample]) -> None:
    model = open_base(tiny_model).eval()
    together = logprobs_of(model, samples, 0.7, Packing(10_000), Ranks("cpu"))
    one_by_one = logprobs_of(model, samples, 0.7, Packing(1), Ranks("cpu"))
    for sample, got, alone in zip(samples, together, one_by_one, strict=True):
        ids = torch.from_numpy(np.concatenate([sample.prompt, sample.tokens]).astype(np.int64))[None]
        with torch.no_grad():
            plain = (model(input_ids=ids).logits[0].float() / 0.7).log_softmax(-1)
        first = len(sample.prompt) - 1
        expected = [plain[first + t, token].item() for t, token in enumerate(sample.tokens.tolist())]
        assert got == pytest.approx(expected, abs=1e-4)
        assert alone == pytest.approx(expected, abs=1e-4)


def test_rows_line_up_with_the_positions_that_predict_them(tiny_model: Path, samples: list[TrainSample]) -> None:
    batch = whole(samples)
    assert batch.ids_RL.shape == (4, 9)  # nothing is predicted from a last token
    assert batch.predictors_N.tolist() == [*range(4, 8), *range(10, 17), 26, *range(29, 32)]
    assert batch.mask_BT.sum(1).tolist() == [completion for _, completion in LENGTHS]
    assert batch.reference_BT is not None
    for i, sample in enumerate(samples):
        at = batch.mask_BT[i] > 0
        assert batch.targets_BT[i][at].tolist() == sample.tokens.tolist()
        assert batch.behaviour_BT[i][at].tolist() == sample.behaviour.tolist()
        assert batch.reference_BT[i][at].tolist() == sample.reference.tolist()
    logprobs, entropy = completion_logprobs(open_base(tiny_model), batch, 1.0)
    assert logprobs.shape == entropy.shape == batch.targets_BT.shape
    assert logprobs.requires_grad
    assert not entropy.requires_grad


def test_samples_with_and_without_a_reference_do_not_mix(samples: list[TrainSample]) -> None:
    bare = TrainSample(
        prompt=samples[0].prompt,
        tokens=samples[0].tokens,
        behaviour=samples[0].behaviour,
        advantages=samples[0].advantages,
    )
    assert whole([bare]).reference_BT is None
    with pytest.raises(ValueError, match="1 of 5 samples lack the reference's log-probs"):
        whole([*samples, bare])


@pytest.mark.parametrize("algorithm", ["online_dpo", "spin"])
def test_updates_on_pairs_do_not_depend_on_micro_batches_and_order(
    algorithm: str, policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    first, second, third, fourth = samples
    unknown = np.full(len(second.tokens), np.nan, np.float32)
    pairs = [replace(first, rejected=third), replace(second, behaviour=unknown, rejected=fourth)]
    told = []
    for tokens, order in ((1, 1), (24, -1), (10_000, 1)):
        made = policy(type=algorithm, kl=None, micro_batch_tokens=tokens, epochs=2, minibatches=1)
        told.append(made.update(pairs[::order], 0, 0.0))
    for name in ("loss", "grad_norm", "preference/margin", "mismatch/mean"):
        assert [metrics[name] for metrics in told] == pytest.approx([told[0][name]] * 3, rel=1e-4)
    assert told[0]["loss"] < 0.6931 or algorithm != "spin"  # log 2 before the first update, less after it


@pytest.mark.parametrize("algorithm", [name for name, made in ALGORITHMS.items() if made.loss != "preference"])
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


def test_a_single_update_is_the_plain_one_bit_for_bit(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    """Without any forward besides: the loss of the micro-batches, its gradient, clipping, AdamW, all by hand."""
    one, by_hand = policy(micro_batch_tokens=12, warmup_steps=0), policy()._model
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    settings, totals = LossSettings(kl=(0.1, "k3")), Totals(15, 4, 128 * 256)
    for bundles, _ in Ranks("cpu").batches(samples, one._packing):
        batch = align(bundles, "cpu")
        new, _ = completion_logprobs(by_hand, batch, 1.0)
        mask, given = batch.mask_BT, (batch.behaviour_BT, batch.advantages_BT)
        policy_loss(Tokens(new, new.detach(), *given, mask, batch.reference_BT), totals, settings)[0].backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    told = one.update(samples, 0, 0.1)
    tensors, config = export_weights(by_hand)
    assert version_digest(joined(tensors), config, "") == _digest(one)
    assert told["clip_fraction"] == 0
    assert told["updates"] == 1
    assert told["grad_norm"] == told["grad_norm/max"]


def test_a_second_update_is_that_of_trls_loss_on_log_probs_from_before_the_first(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    from trl import GRPOTrainer

    options = {"kl": None, "mismatch": None, "clip": {"dual": None}, "schedule": "constant"}
    batch = whole(samples)

    by_hand = policy(**options)
    with torch.no_grad():
        old, _ = completion_logprobs(by_hand._model, batch, 1.0)
    first = by_hand.update(samples, 0, 0.0)
    new, entropy = completion_logprobs(by_hand._model, batch, 1.0)
    t = Tokens(new, old, batch.behaviour_BT, batch.advantages_BT, batch.mask_BT, entropy_BT=entropy)
    lines = torch.tensor([float(s.advantages[0]) for s in samples])
    loss = GRPOTrainer._compute_loss(trainer(t), None, inputs(t) | {"advantages": lines})
    gradients = torch.autograd.grad(loss, [p for p in by_hand._model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    ratio = (new - old).exp()
    outside = ((ratio < 0.8) & (batch.advantages_BT < 0)) | ((ratio > 1.28) & (batch.advantages_BT > 0))
    clipped = (outside * batch.mask_BT).sum().item() / 15
    assert clipped > 0.2

    told = policy(**options, epochs=2).update(samples, 0, 0.0)
    assert told["updates"] == 2
    assert 2 * told["loss"] == pytest.approx(first["loss"] + loss.item(), rel=1e-4)
    assert 2 * told["grad_norm"] == pytest.approx(first["grad_norm"] + norm, rel=1e-4)
    assert told["grad_norm/max"] == pytest.approx(max(first["grad_norm"], norm), rel=1e-4)
    assert told["clip_fraction"] == pytest.approx(clipped / 2)


def test_several_updates_do_not_depend_on_micro_batches(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    told = [
        policy(epochs=2, minibatches=2, micro_batch_tokens=tokens).update(samples, 0, 0.1) for tokens in (1, 12, 10_000)
    ]
    assert told[0]["updates"] == 4
    for other in told[1:]:
        assert other == pytest.approx(told[0], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("updates", [{}, {"epochs": 2, "minibatches": 2}])
def test_leaving_out_what_pushes_nothing_changes_no_gradient(
    updates: dict[str, int],
    aggregation: str,
    policy: Callable[..., Policy],
    samples: list[TrainSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against an update that computes all samples; the second and the last have no advantage."""
    idle = [replace(s, advantages=0 * s.advantages) for s in samples]
    given = [samples[0], idle[1], samples[2], idle[3], samples[0], samples[2]]
    options = {"kl": None, "aggregation": aggregation, "max_grad_norm": 1e9, "micro_batch_tokens": 12, **updates}
    one, other = policy(**options), policy(**options)
    told = one.update(given, 0, 0.0)
    monkeypatch.setattr("raylign.trainers.online.policy.trained", lambda samples, _: samples)
    all_computed = other.update(given, 0, 0.0)
    assert [told[name] for name in ("grad_norm", "grad_norm/max")] == pytest.approx(
        [all_computed[name] for name in ("grad_norm", "grad_norm/max")], rel=1e-6
    )
    for mine, theirs in zip(one._parameters.values(), other._parameters.values(), strict=True):
        if mine.grad is not None and theirs.grad is not None:
            assert (mine.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()
    assert all_computed["loss"] == pytest.approx(told["loss"], rel=1e-5) or updates  # whose shares are of their tokens


def test_metrics_are_means_over_what_is_computed_and_nothing_to_compute_changes_nothing(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    idle = [replace(s, advantages=0 * s.advantages) for s in samples]
    alone, beside = (policy(kl=None).update(given, 0, 0.0) for given in (samples[:2], samples[:2] + idle[2:]))
    for name in ("entropy", "mismatch/mean", "clip_fraction"):
        assert beside[name] == pytest.approx(alone[name], rel=1e-5)
    assert beside["grad_norm"] == pytest.approx(alone["grad_norm"] * 11 / 15, rel=1e-5)
    made = policy(kl=None)
    before = _digest(made)
    assert made.update(idle, 0, 0.0) == {"updated": 0.0}
    assert _digest(made) == before
    assert policy().update(idle, 0, 0.1)["kl"] > 0  # which they do push


def test_an_update_of_a_minibatch_is_normalised_over_its_own_tokens(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    """Twice the same samples: each of two minibatches gives what the whole gives, whichever way they are cut."""
    (one, *_), fields = samples, {"learning_rate": 1e-9}  # so that the second update starts where the first did
    for aggregation in ("token", "sequence", "constant"):
        whole = policy(aggregation=aggregation, **fields).update([one] * 4, 0, 0.1)
        parts = policy(aggregation=aggregation, minibatches=2, **fields).update([one] * 4, 0, 0.1)
        expected = [whole["loss"], whole["grad_norm"], whole["entropy"]]
        assert [parts["loss"], parts["grad_norm"], parts["entropy"]] == pytest.approx(expected, rel=1e-4), aggregation


@pytest.mark.parametrize("updates", [{}, {"epochs": 2, "minibatches": 2}])
def test_going_on_from_a_save_is_bit_equal_to_going_on(
    updates: dict[str, int], policy: Callable[..., Policy], samples: list[TrainSample], tmp_path: Path
) -> None:
    one = policy(**updates)
    one.update(samples, 0, 0.1)
    one.update(samples, 1, 0.1)
    one.save(tmp_path)
    assert one.written(wait=True)
    other = policy(**updates)
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


def test_a_policy_computes_with_the_cores_it_reserves(
    policy: Callable[..., Policy], samples: list[TrainSample]
) -> None:
    before, told = torch.get_num_threads(), []
    try:
        for cpus in (0.5, 2, 2):
            made = policy(policy={"cpus": cpus})
            assert torch.get_num_threads() == max(1, int(cpus))
            told.append((made.update(samples, 0, 0.1), _digest(made)))
    finally:
        torch.set_num_threads(before)
    assert told[1] == told[2]
    assert told[0][0] == pytest.approx(told[1][0], rel=1e-4)
