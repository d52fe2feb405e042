"""The critic without Ray, on a tiny model: values, gradients, what it learns, and going on from a save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raylign.rollout.rewards.model import RewardModel
from raylign.trainers.adapters import open_base, open_reward_model, save_reward_model
from raylign.trainers.online.batch import TrainSample
from raylign.trainers.online.critic import Critic
from raylign.trainers.online.policy import PolicySpec
from raylign.trainers.stages import OnlineStage

from ...rollout.models import make_adapter

LENGTHS = [(5, 4), (2, 7), (9, 1), (3, 3)]
"""Tokens of prompt and completion of each sample."""


@pytest.fixture
def samples() -> list[TrainSample]:
    random = np.random.default_rng(0)
    return [
        TrainSample(
            prompt=random.integers(3, 250, prompt).astype(np.int32),
            tokens=random.integers(3, 250, completion).astype(np.int32),
            behaviour=np.zeros(completion, np.float32),
            advantages=np.zeros(completion, np.float32),
            values=np.zeros(completion, np.float32),
            returns=random.normal(1, 1, completion).astype(np.float32),
        )
        for prompt, completion in LENGTHS
    ]


@pytest.fixture
def critic(tiny_model: Path) -> Callable[..., Critic]:
    """Builds a critic; options are the stage's, and its head is random where it is asked for."""

    def build(*, random_head: bool = False, adapter_folder: Path | None = None, **options: object) -> Critic:
        stage = OnlineStage.model_validate(
            {
                "type": "ppo",
                "adapter": {"r": 4},
                "data": {"path": "none"},
                "rewards": [{"type": "format", "pattern": "x"}],
                "critic": {"learning_rate": 1e-2, "clip": None},
                "schedule": "constant",
                "warmup_steps": 0,
                **options,
            }
        )
        spec = PolicySpec(base=tiny_model, base_digest="", adapter=adapter_folder, stage=stage, seed=1, dtype="float32")
        made = Critic(spec)
        if random_head:
            torch.manual_seed(3)
            torch.nn.init.normal_(made._model.head.weight)
            torch.nn.init.constant_(made._model.head.bias, 0.5)
        return made

    return build


def hidden_states(base: Path, sample: TrainSample) -> torch.Tensor:
    """The last hidden state at each token from which a completion token is predicted, `[T, D]`, of the row alone."""
    ids = torch.from_numpy(np.concatenate([sample.prompt, sample.tokens]).astype(np.int64))[None]
    with torch.no_grad():
        hidden = open_base(base)(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return hidden[len(sample.prompt) - 1 : -1]


@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_values_are_the_heads_on_the_token_before(
    micro_batch_tokens: int, tiny_model: Path, critic: Callable[..., Critic], samples: list[TrainSample]
) -> None:
    made = critic(random_head=True, micro_batch_tokens=micro_batch_tokens)
    for sample, got in zip(samples, made.values(samples), strict=True):
        expected = hidden_states(tiny_model, sample) @ made._model.head.weight[0].detach() + 0.5
        assert got.dtype == np.float32
        assert got == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_new_critic_expects_nothing(critic: Callable[..., Critic], samples: list[TrainSample]) -> None:
    assert not any(row.any() for row in critic().values(samples))


@pytest.mark.parametrize("adapter", [{"r": 4}, None, "of the stage before"])
def test_one_from_a_reward_model_gives_the_scores_of_the_text_so_far(
    adapter: Any, tiny_model: Path, critic: Callable[..., Critic], samples: list[TrainSample], tmp_path: Path
) -> None:
    """A policy's adapter has nothing to do with the reward model's body: the critic's is new, and as large."""
    model = open_reward_model(tiny_model, None, seed=1)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.score.weight)
    folder = save_reward_model(model, tiny_model, tmp_path / "scorer")
    given = {"adapter": adapter, "adapter_folder": None}
    if isinstance(adapter, str):
        make_adapter(tiny_model, tmp_path / "adapter", seed=5, r=2)
        given = {"adapter": None, "adapter_folder": tmp_path / "adapter"}
    made = critic(critic={"path": str(folder)}, **given)
    scorer = RewardModel(folder)
    for sample, got in zip(samples, made.values(samples), strict=True):
        rows = [np.concatenate([sample.prompt, sample.tokens[:t]]) for t in range(len(sample.tokens))]
        assert got == pytest.approx(scorer.scores(rows), abs=1e-4)
    trained = {name: p for name, p in made._learner._trained.items() if not name.startswith("head.")}
    ranks = {p.shape[0] for name, p in trained.items() if "lora_A" in name}
    assert ranks == ({2} if isinstance(adapter, str) else {4} if adapter else set())
    assert len(trained) > 4
    before = made.values(samples)
    made.update(samples, 0)
    assert not np.allclose(before[0], made.values(samples)[0], atol=1e-4)


def test_the_first_gradient_by_hand(
    tiny_model: Path, critic: Callable[..., Critic], samples: list[TrainSample]
) -> None:
    """A head of zeros passes nothing on to the body: d loss / d head = mean of (V − R) (h, 1), with V = 0."""
    features = torch.cat([hidden_states(tiny_model, s) for s in samples])
    returns = torch.from_numpy(np.concatenate([s.returns for s in samples]))
    by_hand = torch.cat([-(returns[:, None] * features).mean(0), -returns.mean()[None]])
    told = critic().update(samples, 0)
    assert told["value/grad_norm"] == pytest.approx(by_hand.norm().item(), rel=1e-4)
    assert told["value/loss"] == pytest.approx(0.5 * returns.square().mean().item(), rel=1e-5)
    assert told["value/mean"] == 0
    assert told["value/explained_variance"] == 0
    assert told["value/learning_rate"] == 1e-2


@pytest.mark.parametrize("adapter", [{"r": 4}, None])
def test_it_learns_the_returns_with_what_trains_of_the_policy(
    adapter: dict[str, int] | None, critic: Callable[..., Critic], samples: list[TrainSample]
) -> None:
    made = critic(adapter=adapter, epochs=4)
    names = set(made._learner._trained)
    assert {"head.weight", "head.bias"} < names
    assert all("lora_" in name for name in names - {"head.weight", "head.bias"}) == bool(adapter)
    before = {name: p.detach().clone() for name, p in made._learner._trained.items()}
    losses = [made.update(samples, step)["value/loss"] for step in range(25)]
    assert losses[-1] < 0.02 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in made._learner._trained.items())
    for sample, got in zip(samples, made.values(samples), strict=True):
        assert got == pytest.approx(sample.returns, abs=0.5)


def test_values_are_held_near_those_before_the_step(critic: Callable[..., Critic], samples: list[TrainSample]) -> None:
    asked = {"learning_rate": 1e-2, "clip": 0.01}
    told = critic(critic=asked, epochs=6).update(samples, 0)
    assert told["value/clip_fraction"] > 0.2
    assert critic(critic=asked).update(samples, 0)["value/clip_fraction"] == 0


def test_an_update_does_not_depend_on_micro_batches(critic: Callable[..., Critic], samples: list[TrainSample]) -> None:
    told = [
        critic(random_head=True, epochs=2, minibatches=2, micro_batch_tokens=tokens).update(samples, 0)
        for tokens in (1, 12, 10_000)
    ]
    for other in told[1:]:
        assert other == pytest.approx(told[0], rel=2e-3, abs=1e-5)


def test_going_on_from_a_save_is_bit_equal_to_going_on(
    critic: Callable[..., Critic], samples: list[TrainSample], tmp_path: Path
) -> None:
    one, other = critic(epochs=2, minibatches=2), critic(epochs=2, minibatches=2)
    one.update(samples, 0)
    one.save(tmp_path)
    assert one.written(wait=True)
    other.load(tmp_path)
    assert one.update(samples, 1) == other.update(samples, 1)
    for mine, its in zip(one.values(samples), other.values(samples), strict=True):
        assert mine.tobytes() == its.tobytes()
        assert mine.any()


def test_without_samples_nothing_changes_and_samples_without_returns_are_an_error(
    critic: Callable[..., Critic], samples: list[TrainSample]
) -> None:
    made = critic()
    assert made.update([], 0) == {}
    assert not made.values(samples)[0].any()
    bare = [
        TrainSample(prompt=s.prompt, tokens=s.tokens, behaviour=s.behaviour, advantages=s.advantages) for s in samples
    ]
    with pytest.raises(ValueError, match="samples that have values and returns"):
        made._backward(bare)
