"""Tiny random models of several architectures, and adapters for them, made by their own libraries."""

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE),
    "qwen3": ("Qwen3", _SHAPE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _SHAPE),
    "mistral-sliding": ("Mistral", _SHAPE | {"sliding_window": 6}),
    "gemma": ("Gemma", _SHAPE),
    "gemma3-sliding": ("Gemma3Text", _SHAPE | {"sliding_window": 6, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", _SHAPE | {"sliding_window": None}),
    "mixtral": ("Mixtral", _SHAPE | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", _SHAPE | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        | {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def save_model(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of an architecture and return its folder."""
    import torch
    import transformers

    name, shape = _ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**shape | changes)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, folder: Path, seed: int, *, r: int = 4, targets: Any = "all-linear", rslora: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A PEFT adapter with random A and B on a base, written and read again: tensors and config."""
    import torch
    from peft import LoraConfig, get_peft_model
    from raylign.cluster.weights import load_adapter
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return load_adapter(folder)
