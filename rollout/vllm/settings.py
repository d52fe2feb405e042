"""How a vLLM engine is set up: what its processes inherit, its memory, and whether it can take adapters."""

# pyright: reportMissingImports=false

import os
from pathlib import Path
from typing import Any, Literal

from ...cluster.errors import InputError
from ..records import MAX_TOP_LOGPROBS

MAX_RANK = {"cpu": 32, "cuda": 64}
"""The highest rank of an adapter. vLLM pads every adapter to it, and on a CPU copies as much for every token."""
BATCH_ADAPTERS = 4
"""Adapters that rows of one forward may use; rows of further ones wait for a place."""
CACHED_ADAPTERS = 64
"""Adapters kept in memory; further ones are read from their folders again."""

_BLOCK_TOKENS = 128
"""What vLLM gives a row at a time on a CPU."""
_MEMORY_SHARE = 0.25
"""The most of the machine's free memory that a cache on a CPU takes."""


def prepare_environment(device: str) -> None:
    """Set what vLLM's own processes inherit; before the first import of vllm, which reads part of it.

    Threads: Ray gives an actor as many OpenMP threads as it reserves CPUs; vLLM would bind each engine to all cores.
    On a CPU nothing is compiled: vLLM itself compiles no model that takes adapters, and for its sampler's few lines the
    first batch would wait 15 s.
    """
    if device == "cpu":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def engine_args(
    folder: Path, slots: int, max_length: int, dtype: Literal["float32", "bfloat16"], device: str
) -> tuple[Any, Any]:
    """vLLM's arguments for a model folder, and the model's own configuration.

    Raises `InputError` for a folder or architecture that vLLM cannot run, and for a device it was not built for.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    if current_platform.device_type != device:
        raise InputError(f"this vLLM is built for {current_platform.device_type}, the rollout worker has {device}")
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_num_seqs": slots,
        "max_logprobs": MAX_TOP_LOGPROBS,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    try:
        model = AsyncEngineArgs(**settings).create_model_config()
    except (ValueError, OSError) as error:
        raise InputError(f"vLLM cannot run {folder}: {_first_line(error)}") from None
    if device == "cpu":
        _check_head_size(model, folder)
    settings["max_model_len"] = min(max_length, model.max_model_len)
    if takes_adapters(model):
        settings |= {
            "enable_lora": True,
            "max_lora_rank": MAX_RANK[device],
            "max_loras": BATCH_ADAPTERS + (device == "cpu"),  # one more for the base model's rows, see engine.py
            "max_cpu_loras": CACHED_ADAPTERS,
        }
    if device == "cpu":
        bytes_ = cache_bytes(model, slots, settings["max_model_len"], 4 if dtype == "float32" else 2)
        settings |= {"enforce_eager": True, "block_size": _BLOCK_TOKENS, "kv_cache_memory_bytes": bytes_}
    else:
        settings["enable_sleep_mode"] = True
    return AsyncEngineArgs(**settings), model


def _check_head_size(model: Any, folder: Path) -> None:
    """vLLM itself finds out with the first batch, and does not survive it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = model.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise InputError(
            f"{folder} has attention heads of size {size}; on a CPU vLLM has {', '.join(map(str, sizes))}: use the "
            "native engine"
        )


def takes_adapters(model: Any) -> bool:
    """Whether vLLM has LoRA for this architecture."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    architecture, _ = ModelRegistry.resolve_model_cls(model.architectures, model)
    return supports_lora(architecture)


def cache_bytes(model: Any, slots: int, max_length: int, item_bytes: int) -> int:
    """Memory of a KV cache in which all slots can be full, or what the machine has room for; at least one full row."""
    import psutil

    config = model.hf_text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    block = 2 * config.num_hidden_layers * heads * model.get_head_size() * _BLOCK_TOKENS * item_bytes
    row = (-(-max_length // _BLOCK_TOKENS) + 1) * block
    room = int(psutil.virtual_memory().available * _MEMORY_SHARE)
    return max(row + block, min(slots * row, room))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
