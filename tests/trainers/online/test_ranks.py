"""A policy and a critic of two ranks in two processes against those of one, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.cluster.errors import InputError, RunFailed
from raylign.trainers.adapters import open_base
from raylign.trainers.online.prefixes import Packing
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.scoring_model import align, completion_logprobs
from raylign.trainers.stages.learners import LearnerResources

from .rank_process import Group, learn_values, samples, spec, train

FULL, LORA = {"adapter": None}, {"adapter": {"r": 4}}
WHOLE = LORA | {"policy": {"ranks": 2, "shard": False}}


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.close()


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    assert list(ours) == list(theirs)
    gaps = sum(float(((ours[n] - theirs[n]).astype(np.float64) ** 2).sum()) for n in theirs)
    return (gaps / sum(float((theirs[n].astype(np.float64) ** 2).sum()) for n in theirs)) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_share_a_quantised_base(dtype: str, pair: Group, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapter, policy = {"r": 4, "quantize": "nf4"}, {"ranks": 2, "activation_checkpointing": True}
    given = spec(tiny_model, dtype, adapter=adapter, policy=policy, micro_batch_tokens=12)
    alone, (first, second) = train(None, given, [samples()]), pair.do(train, spec=given, updates=[samples()])
    assert distance(first["gradient"], alone["gradient"]) < (1e-6 if dtype == "float32" else 1e-2)
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("trained", [LORA, FULL, WHOLE], ids=["lora", "full", "not-sharded"])
def test_two_ranks_have_the_gradient_of_one(trained: dict[str, Any], pair: Group, tiny_model: Path) -> None:
    given = spec(tiny_model, **trained, micro_batch_tokens=12, entropy_bonus=0.1)
    for updates in ([samples()], [samples()] * 2):
        alone = train(None, given, updates)
        first, second = pair.do(train, spec=given, updates=updates)
        assert distance(first["gradient"], alone["gradient"]) < 1e-6 * 20 ** (len(updates) - 1)
        assert distance(first["weights"], alone["weights"]) < 1e-5
        assert first["metrics"] == second["metrics"]
        for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert second["weights"] == {}


def test_several_updates_an_epoch_a_frozen_bf16_base_and_another_order(pair: Group, tiny_model: Path) -> None:
    """Log-probs before the step come from all ranks; a shard may mix a frozen bf16 base and a float32 adapter."""
    given = spec(tiny_model, "bfloat16", epochs=2, micro_batch_tokens=12, learning_rate=1e-3)
    alone = train(None, given, [samples()])
    for order in (1, -1):
        first, _ = pair.do(train, spec=given, updates=[samples()[::order]])
        assert first["metrics"][0]["updates"] == 2
        assert distance(first["weights"], alone["weights"]) < 1e-3
        assert first["metrics"][0] == pytest.approx(alone["metrics"][0], rel=0.02, abs=1e-3)


def test_a_rank_without_a_sample_takes_part(pair: Group, tiny_model: Path) -> None:
    for algorithm in ("grpo", "gspo", "dr_grpo"):
        given, one = spec(tiny_model, type=algorithm), samples()[:1]
        alone = train(None, given, [one])
        first, second = pair.do(train, spec=given, updates=[one, []])
        assert distance(first["gradient"], alone["gradient"]) < 1e-6
        assert first["metrics"][1] == second["metrics"][1] == {"updated": 0.0}


def test_a_nan_gradient_is_raised_by_every_rank_and_names_the_policy(pair: Group, tiny_model: Path) -> None:
    broken = samples()
    broken[0].advantages[:] = np.nan
    for error in pair.do(train, spec=spec(tiny_model), updates=[broken]):
        assert isinstance(error, RunFailed)
        assert str(error).startswith("step 0: the gradient of the policy is nan (loss nan): lower its learning_rate")


@pytest.mark.parametrize("trained", [LORA, FULL, WHOLE], ids=["lora", "full", "not-sharded"])
def test_what_ranks_save_any_number_goes_on_from(
    trained: dict[str, Any], pair: Group, tiny_model: Path, tmp_path: Path
) -> None:
    given, steps = spec(tiny_model, **trained, learning_rate=1e-3), [samples()] * 2
    saved, _ = pair.do(train, spec=given, updates=steps, save=tmp_path)
    loaded, _ = pair.do(train, spec=given, updates=[], load=tmp_path)
    alone = train(None, given, [], load=tmp_path)
    assert loaded["digest"] == alone["digest"] == saved["digest"]
    whole, _ = pair.do(train, spec=given, updates=[*steps, samples()])
    went_on, _ = pair.do(train, spec=given, updates=[samples()], load=tmp_path)
    assert went_on["digest"] == whole["digest"] != saved["digest"]
    alone = train(None, given, [samples()], load=tmp_path)
    assert distance(alone["weights"], whole["weights"]) < 1e-5


def test_a_critic_of_two_ranks_is_that_of_one(pair: Group, tiny_model: Path) -> None:
    critic = {"learning_rate": 1e-2, "clip": None}
    given = spec(tiny_model, type="ppo", critic=critic, kl=None, micro_batch_tokens=12)
    alone = learn_values(None, given, [samples()] * 2)
    first, second = pair.do(learn_values, spec=given, updates=[samples()] * 2)
    assert distance(first["gradient"], alone["gradient"]) < 1e-4
    assert first["metrics"] == second["metrics"]
    assert first["metrics"][1] == pytest.approx(alone["metrics"][1], rel=1e-4)
    for ours, others, theirs in zip(first["values"], second["values"], alone["values"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert np.array_equal(ours, others)


@pytest.mark.parametrize("trained", [LORA, FULL], ids=["lora", "full"])
def test_recomputed_activations_change_no_bit(trained: dict[str, Any], pair: Group, tiny_model: Path) -> None:
    kept, again = (
        spec(tiny_model, **trained, micro_batch_tokens=12, policy={"ranks": 2, "activation_checkpointing": recompute})
        for recompute in (False, True)
    )
    wanted, got = train(None, kept, [samples()] * 2), train(None, again, [samples()] * 2)
    assert got["metrics"] == wanted["metrics"]
    assert got["digest"] == wanted["digest"]
    both = [pair.do(train, spec=given, updates=[samples()] * 2)[0] for given in (kept, again)]
    assert both[0]["digest"] == both[1]["digest"]


def test_recomputed_activations_take_less_memory(tiny_model: Path) -> None:
    """What the graph of one forward holds: the input of each of two layers instead of all that they compute."""

    def held(*, recompute: bool) -> int:
        model = Ranks("cpu").spread(open_base(tiny_model), LearnerResources(activation_checkpointing=recompute))
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            completion_logprobs(model, align(Packing(10_000).bundles(samples()), "cpu"), 1.0)[0].sum()
        return sum(saved.values())

    assert held(recompute=True) < 0.8 * held(recompute=False)


def test_a_model_without_layers_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="activation_checkpointing: Linear marks no layers; leave it out"):
        Ranks("cpu").spread(torch.nn.Linear(1, 1), LearnerResources(activation_checkpointing=True))
