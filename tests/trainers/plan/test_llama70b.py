"""Llama-3-70B by its published config: the known numbers, from a config.json alone."""

import json
from pathlib import Path
from typing import Any

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PARAMETERS = 70_553_706_496  # as on its model card
LORA = 16 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
LINEAR = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the config."""
    folder = tmp_path_factory.mktemp("llama-3-70b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def stage_of(llama: Path, tmp_path: Path, stage: str, dtype: str = "bfloat16") -> dict[str, Any]:
    from raylign.trainers.plan.stages import plan_stages
    from raylign.trainers.recipe import load_recipe

    recipe = tmp_path / "large.yaml"
    recipe.write_text(f"name: large\nmodel: {{path: {llama}, dtype: {dtype}}}\nstages:\n  - {stage}\n")
    (planned,) = plan_stages(load_recipe(recipe, planning=True), llama)
    return planned.facts()


def test_all_weights_in_bf16_are_840_gb(llama: Path, tmp_path: Path) -> None:
    facts = stage_of(llama, tmp_path, "{type: sft, data: {path: none.jsonl}, batch_size: 1, max_length: 128}")
    assert facts["parameters"] == facts["trained_parameters"] == PARAMETERS
    assert facts["total_gb"] == pytest.approx(PARAMETERS * 12 / 1e9, abs=0.01)
    assert facts["total_gb"] == pytest.approx(840, rel=0.02)
    assert facts["items"]["gradients"] == pytest.approx(141.1, abs=0.1)


def test_lora_is_150_gb(llama: Path, tmp_path: Path) -> None:
    stage = "{type: sft, data: {path: none.jsonl}, batch_size: 1, max_length: 1024, adapter: {r: 16}}"
    facts = stage_of(llama, tmp_path, stage)
    assert facts["trained_parameters"] == LORA == 207_093_760
    assert facts["total_gb"] == pytest.approx((PARAMETERS * 2 + LORA * 16) / 1e9, abs=0.01)
    assert facts["total_gb"] == pytest.approx(150, rel=0.05)


def test_qlora_is_48_gb(llama: Path, tmp_path: Path) -> None:
    stage = "{type: grpo, data: {path: none.jsonl}, rewards: [{type: format, pattern: x}], steps: 10, batch_size: 8, "
    stage += "adapter: {r: 16, quantize: nf4}, policy: {activation_checkpointing: true}, micro_batch_tokens: 1280}"
    facts = stage_of(llama, tmp_path, stage, dtype="float32")
    packed = LINEAR * (0.5 + 1 / 64 + 4 / 16384)
    assert facts["total_gb"] == pytest.approx((packed + (PARAMETERS - LINEAR) * 4 + LORA * 16) / 1e9, abs=0.01)
    assert facts["total_gb"] == pytest.approx(48, rel=0.05)
    policy, rollout = facts["roles"]
    assert (policy["role"], rollout["role"]) == ("policy", "rollout")
    # 65 rows of 1280 tokens, 80 layers, keys and values of 8 heads of 128 dimensions in float32
    assert rollout["items"]["kv_cache"] == pytest.approx(65 * 1280 * 80 * 2 * 8 * 128 * 4 / 1e9, abs=0.001)
