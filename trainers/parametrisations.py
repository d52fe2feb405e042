"""From a recipe's `adapter` to PEFT's own config of it. Imports torch and PEFT where they are needed."""

from typing import Any

from ..cluster.imports import importing
from .stages.adapters import (
    AdaLoraConfig,
    AnyAdapter,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    LoraPlusConfig,
    PissaConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RsLoraConfig,
)

_TOKEN_HEADS = ["score", "classifier"]
"""What transformers calls the head of a token classifier, which trains whole."""

LowRank = LoraConfig | RsLoraConfig | DoraConfig | LoraPlusConfig | PissaConfig


def peft_config(adapter: AnyAdapter, task: str, *, steps: int, tokenizer: str) -> Any:
    """PEFT's config of an adapter, for a `task` of PEFT's; `steps` are those of the stage, `tokenizer` its folder."""
    with importing():
        import peft

    heads = _TOKEN_HEADS if task == "TOKEN_CLS" else None  # PEFT knows by itself that other heads are no layer
    match adapter:
        case AdaLoraConfig():
            return peft.AdaLoraConfig(task_type=task, exclude_modules=heads, **_adalora(adapter, steps))
        case Ia3Config():
            chosen = {"target_modules": adapter.targets, "feedforward_modules": adapter.feedforward}
            return peft.IA3Config(task_type=task, **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
        case PromptTuningConfig():
            start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": adapter.text} if adapter.text else {}
            return peft.PromptTuningConfig(
                task_type=task,
                num_virtual_tokens=adapter.tokens,
                tokenizer_name_or_path=tokenizer if adapter.text else None,
                **start,  # type: ignore[arg-type]
            )
        case PrefixTuningConfig():
            return peft.PrefixTuningConfig(
                task_type=task, num_virtual_tokens=adapter.tokens, prefix_projection=adapter.project
            )
        case PTuningConfig():
            return peft.PromptEncoderConfig(
                task_type=task,
                num_virtual_tokens=adapter.tokens,
                encoder_reparameterization_type=adapter.encoder.upper(),
                encoder_hidden_size=adapter.hidden,
            )
        case LoraConfig() | RsLoraConfig() | DoraConfig() | LoraPlusConfig() | PissaConfig():
            return peft.LoraConfig(task_type=task, exclude_modules=heads, **_low_rank(adapter))
        case _:
            raise AssertionError(f"{adapter.type} is no adapter of PEFT's")


def _low_rank(adapter: LowRank) -> dict[str, Any]:
    kinds = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
    }
    return {
        "r": adapter.r,
        "lora_alpha": _whole(adapter.alpha or 2 * adapter.r),
        "lora_dropout": adapter.dropout,
        "target_modules": adapter.targets,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in adapter.alpha_pattern.items()},
        "modules_to_save": adapter.modules_to_save or None,
        **kinds.get(adapter.type, {}),
    }


def _adalora(adapter: AdaLoraConfig, steps: int) -> dict[str, Any]:
    return {
        "target_r": adapter.r,
        "init_r": adapter.initial_r or max(adapter.r + 1, round(1.5 * adapter.r)),
        "lora_alpha": _whole(adapter.alpha or 2 * adapter.r),
        "lora_dropout": adapter.dropout,
        "target_modules": adapter.targets,
        "total_step": steps,
        "tinit": int(adapter.warmup * steps),
        "tfinal": int(adapter.final * steps),
    }


def _whole(number: float) -> float:
    """PEFT writes 32 and not 32.0, and so do we."""
    return int(number) if float(number).is_integer() else number
