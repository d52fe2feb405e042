"""Random Llama-type models of fixed sizes: speed does not depend on what the weights say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["fp32", "bf16"]
TORCH_NAMES: dict[Dtype, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama model with tied embeddings, heads of 64 dimensions (32 in the smallest), two query heads a key head."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of one layer's matrices, as transformers multiplies by them."""
        half = self.hidden // 2
        h, i = self.hidden, self.intermediate
        return [(h, h), (half, h), (half, h), (h, h), (i, h), (i, h), (h, i)]

    @property
    def head(self) -> tuple[int, int]:
        """Outputs and inputs of the output layer."""
        return self.vocabulary, self.hidden

    @property
    def parameters(self) -> int:
        """Weights, those of the norms left out."""
        return self.layers * sum(o * i for o, i in self.matrices) + self.vocabulary * self.hidden


SHAPES = {
    "1M": Shape(vocabulary=2048, hidden=128, intermediate=384, layers=4, heads=4),
    "25M": Shape(vocabulary=16384, hidden=512, intermediate=1408, layers=6, heads=8),
    "120M": Shape(vocabulary=49152, hidden=768, intermediate=2304, layers=12, heads=12),
    "500M": Shape(vocabulary=151936, hidden=896, intermediate=4864, layers=24, heads=14),
}


def save_model(size: str, dtype: Dtype, folder: Path) -> Path:
    """Write a random model and the tokenizer that vLLM and TRL ask for; the same weights for the same arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, TORCH_NAMES[dtype])).save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype: Dtype, device: str = "cpu") -> Any:
    """The model as a peer uses it: transformers' own class with SDPA, no gradients kept."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, TORCH_NAMES[dtype]), attn_implementation="sdpa", local_files_only=True
    )
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer (any text, no merges) with a ChatML template; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    return len(tokens)


def tiny_model(folder: Path) -> Path:
    """Write a random model of two layers with a byte-level tokenizer and a chat template, which a run can train."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
