"""Frozen bases in four bits (QLoRA, 2305.14314), through bitsandbytes, which the extra `qlora` brings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.errors import InputError
from ..cluster.imports import importing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_nf4(base: Path, *, dtype: str) -> "PreTrainedModel":
    """The model of a folder with its linear layers in NF4, doubly quantised; what is not of them has the `dtype`.

    The head stays as it is. Packed weights are stored in elements of the `dtype`, so that FSDP2 shards them beside the
    rest. Raises `InputError` where bitsandbytes is not installed, and `OSError` or `ValueError` as transformers does.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    try:
        with importing():
            from bitsandbytes.nn.modules import Linear4bit
    except ImportError as error:
        raise InputError(f"adapter.quantize nf4 needs bitsandbytes: pip install 'raylign[qlora]' ({error})") from error
    kind = getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=kind, use_safetensors=True, quantization_config=config)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            layer.quant_state = weight.quant_state  # a shard of the weight forgets it, and asks the layer
            layer.support_avx512bf16_for_cpu = (
                False  # in evaluation mode it would repack its weight, as bf16 kernels ask
            )
    return model
