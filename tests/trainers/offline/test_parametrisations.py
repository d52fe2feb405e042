"""Every offline method with every parametrisation: a few steps as a worker makes them, saved, read back, same logits.

A cell runs without Ray: `test_stage.py` and the recipes run some through it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from raylign.cluster.config import Resources
from raylign.cluster.weights import load_adapter
from raylign.trainers.adapters import open_base, open_model
from raylign.trainers.config import RunConfig
from raylign.trainers.data.rows import kind_of_stage
from raylign.trainers.offline.galore import GaloreAdamW, subspace
from raylign.trainers.offline.hf_trainer import training_options
from raylign.trainers.offline.worker import _write_outcome
from raylign.trainers.stages import OfflineStage
from raylign.trainers.stages.adapters import served_per_row, trains_all, virtual

from .worked import job, losses, rows, trainer_of

METHODS: dict[str, dict[str, Any]] = {
    "cpt": {},
    "sft": {},
    "distill": {"teacher": {"path": "set below"}},
    "dpo": {},
    "kto": {},
    "orpo": {},
    "simpo": {},
    "reward_model": {},
    "process_reward_model": {},
}
PARAMETRISATIONS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "nothing": (1e-3, None),
    "full": (1e-3, {"type": "full"}),
    "galore": (1e-2, {"type": "galore", "r": 4, "update_every": 2}),
    "lora": (1e-2, {"r": 4, "dropout": 0.1, "rank_pattern": {"q_proj": 2}}),
    "lora, patterns and whole modules": (
        1e-2,
        {
            "r": 4,
            "alpha_pattern": {"q_proj": 2},
            "modules_to_save": ["input_layernorm"],
            "targets": ["q_proj", "v_proj"],
        },
    ),
    "rslora": (1e-2, {"type": "rslora", "r": 4}),
    "dora": (1e-2, {"type": "dora", "r": 4}),
    "lora_plus": (1e-3, {"type": "lora_plus", "r": 4}),
    "pissa": (1e-3, {"type": "pissa", "r": 4}),
    "adalora": (3e-2, {"type": "adalora", "r": 2, "initial_r": 4}),
    "ia3": (1e-1, {"type": "ia3"}),
    "prompt": (3e-1, {"type": "prompt", "tokens": 4, "text": "add"}),
    "prefix": (1e-1, {"type": "prefix", "tokens": 4}),
    "prefix, projected": (1e-2, {"type": "prefix", "tokens": 4, "project": True}),
    "p_tuning": (1e-2, {"type": "p_tuning", "tokens": 4, "hidden": 16}),
    "p_tuning, lstm": (1e-2, {"type": "p_tuning", "tokens": 4, "hidden": 16, "encoder": "lstm"}),
    "qlora": (1e-2, {"r": 4, "quantize": "nf4"}),
    "qdora": (1e-2, {"type": "dora", "r": 4, "quantize": "nf4"}),
}
REWARDS = ("reward_model", "process_reward_model")
VIRTUAL = ("prompt", "prefix", "prefix, projected", "p_tuning", "p_tuning, lstm")
BEFORE_THE_ROW = ("prompt", "p_tuning", "p_tuning, lstm")


def refused(method: str, parametrisation: str) -> bool:
    if method in REWARDS:
        return parametrisation in VIRTUAL or parametrisation in ("qlora", "qdora")
    return method in ("orpo", "simpo") and parametrisation in BEFORE_THE_ROW


CELLS = [(m, p) for m in METHODS for p in PARAMETRISATIONS]


def stage_of(method: str, parametrisation: str) -> OfflineStage:
    rate, adapter = PARAMETRISATIONS[parametrisation]
    common = {"data": {"path": "x"}, "steps": 4, "batch_size": 4, "warmup_steps": 0, "learning_rate": rate}
    given = {"type": method, **common, **METHODS[method]} | ({"adapter": adapter} if adapter else {})
    return TypeAdapter(OfflineStage).validate_python(given)


@pytest.mark.parametrize(("method", "parametrisation"), [c for c in CELLS if refused(*c)])
def test_what_cannot_work_together_is_refused_with_the_reason(method: str, parametrisation: str) -> None:
    says = r"adapter\.(type|quantize) \w+: (a reward model|its virtual tokens stand before the row).*(take|leave)"
    with pytest.raises(ValidationError, match=says):
        stage_of(method, parametrisation)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 9, 40, 2]])).logits.numpy()


def quick(method: str, parametrisation: str) -> bool:
    return method in ("sft", "dpo") or parametrisation in ("lora", "full")


@pytest.mark.parametrize(
    ("method", "parametrisation"),
    [pytest.param(*c, marks=() if quick(*c) else pytest.mark.slow) for c in CELLS if not refused(*c)],
)
def test_it_learns_and_what_is_saved_is_what_was_trained(
    method: str, parametrisation: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    if parametrisation[0] == "q":
        pytest.importorskip("bitsandbytes")
    stage = stage_of(method, parametrisation)
    made = job(stage, tiny_model, tmp_path, teacher=other_model)
    trainer = trainer_of(made, rows(kind_of_stage(stage), 4), tmp_path / "scratch")
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < curve[0]

    outcome = _write_outcome(made, trainer.model, None)
    trained = logits(trainer.accelerator.unwrap_model(trainer.model))
    if parametrisation[0] == "q":  # on 4 bits: what is served or merged is on the base as it is
        (folder,) = (tmp_path / "adapters").iterdir()
        again: Any = PeftModel.from_pretrained(open_base(tiny_model, quantize="nf4"), str(folder))
    else:
        again = reopened(stage, outcome, tiny_model)
    assert np.allclose(logits(again), trained, atol=2e-4)


def reopened(stage: OfflineStage, outcome: dict[str, Any], base: Path) -> Any:
    """The model that a user would open from what the stage wrote, with transformers and PEFT alone."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    if "reward_model" in outcome:
        kinds = {"reward_model": AutoModelForSequenceClassification}
        kind = kinds.get(stage.type, AutoModelForTokenClassification)
        return kind.from_pretrained(outcome["reward_model"])
    if outcome.get("adapter"):
        return PeftModel.from_pretrained(open_base(base), outcome["adapter"])
    return open_base(Path(outcome["base"]))


# ---- what the types are


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_engines_get_plain_factors_and_the_rest_is_merged(parametrisation: str) -> None:
    """What a stage leaves says what can be served: an adapter for the engines, a new base, or virtual tokens."""
    own = stage_of("sft", parametrisation).adapter
    left = "base" if trains_all(own) else "adapter"
    if own and left == "adapter" and not (served_per_row(own) or virtual(own)):
        left = "merged"
    assert left == {
        **dict.fromkeys(("nothing", "full", "galore"), "base"),
        **dict.fromkeys(("dora", "adalora", "ia3", "qdora", "lora, patterns and whole modules"), "merged"),
    }.get(parametrisation, "adapter")


def test_pissa_leaves_a_lora_of_twice_the_rank_that_engines_read(tiny_model: Path, tmp_path: Path) -> None:
    made = job(stage_of("sft", "pissa"), tiny_model, tmp_path)
    trainer = trainer_of(made, rows("messages", 4), tmp_path / "scratch")
    trainer.train()
    folder = Path(_write_outcome(made, trainer.model, None)["adapter"])
    tensors, config = load_adapter(folder)
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight")} == {8}
    goes_on = open_model(tiny_model, folder, None, seed=0)  # as the next stage opens it
    assert np.allclose(logits(goes_on), logits(trainer.model), atol=2e-4)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_a_whole_head_beside_an_adapter_trains_and_leaves_its_embedding(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The tiny model's head is its embedding: trained beside it, it is another, in the merged folder too."""
    given = {"type": method, "data": {"path": "x"}, "steps": 2, "batch_size": 4, "warmup_steps": 0}
    adapter = {"r": 2, "modules_to_save": ["lm_head"]}
    stage = TypeAdapter(OfflineStage).validate_python(given | {"learning_rate": 1e-2, "adapter": adapter})
    made = job(stage, tiny_model, tmp_path)
    trainer = trainer_of(made, rows(kind_of_stage(stage), 4), tmp_path / "scratch")
    trainer.train()
    merged = open_base(Path(_write_outcome(made, trainer.model, None)["base"]))
    assert np.allclose(logits(merged), logits(trainer.model), atol=2e-4)
    before = open_base(tiny_model).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)


def test_qlora_has_paged_moments_on_a_gpu_alone(tiny_model: Path, tmp_path: Path) -> None:
    def optimizer(parametrisation: str, gpus: float) -> str | None:
        stage = stage_of("sft", parametrisation).model_copy(update={"resources": Resources(gpus=gpus)})
        return training_options(job(stage, tiny_model, tmp_path), tmp_path).get("optim")

    assert [optimizer("qlora", 1), optimizer("qlora", 0), optimizer("lora", 1)] == ["paged_adamw_32bit", None, None]


def test_lora_plus_learns_b_faster(tiny_model: Path, tmp_path: Path) -> None:
    made = job(stage_of("sft", "lora_plus"), tiny_model, tmp_path)
    trainer = trainer_of(made, rows("messages", 4), tmp_path / "scratch")
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {names[id(p)].split(".")[-3]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert rates == {"lora_A": 1e-3, "lora_B": pytest.approx(16e-3)}


def test_galore_moves_a_matrix_within_the_subspace_of_its_gradient() -> None:
    torch.manual_seed(0)
    grad = torch.randn(4, 6)

    def stepped(optimizer_of: Any) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        weight.grad = grad.clone()
        optimizer_of(weight).step()
        return weight.detach()

    def galore(rank: int | None) -> torch.Tensor:
        group = {"rank": rank, "scale": 0.5 if rank else 1.0, "update_every": 100}
        return stepped(lambda w: GaloreAdamW([{"params": [w], **group}], lr=0.1, betas=(0.9, 0.999)))

    assert torch.allclose(galore(None), stepped(lambda w: torch.optim.AdamW([w], lr=0.1, weight_decay=0.0)), atol=1e-6)
    basis = subspace(grad, 2)
    expected = -0.1 * 0.5 * basis @ (basis.T @ grad).sign()  # Adam's first step is the gradient's sign
    assert torch.allclose(galore(2), expected, atol=1e-4)


def test_galore_holds_moments_of_the_rank_alone(tiny_model: Path, tmp_path: Path) -> None:
    made = job(stage_of("sft", "galore"), tiny_model, tmp_path)
    trainer = trainer_of(made, rows("messages", 4), tmp_path / "scratch")
    trainer.train()
    inner = {id(p) for n, p in trainer.model.named_parameters() if "_proj" in n}
    moments = {id(p): state["exp_avg"].shape for p, state in trainer.optimizer.optimizer.state.items()}
    assert inner
    assert all(4 in moments[i] for i in inner)


STAGE = {"type": "sft", "data": {"path": "a"}, "adapter": {"type": "prompt"}}
RECIPE = {"name": "x", "model": {"path": "m"}, "stages": [STAGE]}
ONLINE = {"type": "grpo", "data": {"path": "p"}, "rewards": [{"type": "format", "pattern": "x"}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"serve": {"alias": "y"}}, r"stages\.0\.adapter\.type prompt: .* so it cannot be served"),
        ({"stages": [STAGE, ONLINE]}, "so a later stage cannot train on from it"),
        ({"stages": [ONLINE | {"adapter": {"type": "dora"}}]}, "Input should be 'lora'"),
        ({"stages": [ONLINE | {"adapter": {"modules_to_save": ["lm_head"]}}]}, "engines add plain low-rank factors"),
        ({"stages": [STAGE | {"adapter": {"type": "pissa", "quantize": "nf4"}}]}, "pissa takes principal directions"),
        ({"stages": [STAGE | {"adapter": {"type": "lorra"}}]}, "lorra"),
    ],
)
def test_recipes_with_what_no_engine_can_add_are_refused(change: dict[str, Any], says: str) -> None:
    RunConfig.model_validate(RECIPE)
    with pytest.raises(ValidationError, match=says):
        RunConfig.model_validate(RECIPE | change)
