"""Hugging Face's and TRL's trainers, set up from a stage. Imported by training workers only: it pulls in torch.

What was proven is what is trained: rows arrive as tokens and labels, and TRL's own preparation is off. TRL is imported
by the stages that use it: each of its trainers costs a worker seconds.
"""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from ..stages import (
    CptStage,
    DistillStage,
    DpoStage,
    KtoStage,
    OrpoStage,
    ProcessRewardModelStage,
    RewardModelStage,
    SftStage,
    SimpoStage,
)
from ..stages.adapters import AdaLoraConfig
from .collators import collator
from .distill import distill
from .peft_state import RankBudget
from .preferences import dpo, kto
from .recipe_trainer import FollowsRecipe
from .reference_free import orpo, simpo
from .reward_models import process_reward_model, reward_model
from .stage import TrainJob
from .worker import workers


def make_trainer(job: TrainJob, model: Any, rows: Dataset, scratch: Path) -> Trainer:
    """The trainer of a stage; checkpoints go to `scratch` first. `rows` stand in the order of the whole run."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    if getattr(job.stage.adapter, "quantize", None):
        model.is_loaded_in_4bit = False  # TRL would round the adapter of a quantised base to bfloat16
    common = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
    trainer = _of_stage(job, training_options(job, scratch), common)
    trainer.job = job
    if isinstance(job.stage.adapter, AdaLoraConfig):
        trainer.add_callback(RankBudget(trainer.model))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _of_stage(job: TrainJob, options: dict[str, Any], common: dict[str, Any]) -> Any:
    match job.stage:
        case CptStage():
            return _cpt(job, options, common)
        case SftStage():
            return _sft(job, options, common)
        case DistillStage():
            return distill(job, options, common)
        case DpoStage():
            return dpo(job, options, common)
        case KtoStage():
            return kto(job, options, common)
        case OrpoStage():
            return orpo(job, options, common)
        case SimpoStage():
            return simpo(job, options, common)
        case RewardModelStage():
            return reward_model(options, common)
        case ProcessRewardModelStage():
            return process_reward_model(options, common)


def _cpt(job: TrainJob, options: dict[str, Any], common: dict[str, Any]) -> Any:
    kind = type("CptTrainer", (FollowsRecipe, Trainer), {})
    return kind(args=TrainingArguments(**options), data_collator=collator(job, common), **common)


def _sft(job: TrainJob, options: dict[str, Any], common: dict[str, Any]) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    kind = type("SftTrainer", (FollowsRecipe, SFTTrainer), {})
    args = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **options)
    return kind(args=args, data_collator=collator(job, common), **common)


def training_options(job: TrainJob, scratch: Path) -> dict[str, Any]:
    """The training arguments all trainers share."""
    stage = job.stage
    share = stage.batch_size // workers()
    micro = stage.micro_batch_size or share
    paged = getattr(stage.adapter, "quantize", None) and stage.resources.gpus  # moments can go to the host
    return {
        **({"optim": "paged_adamw_32bit"} if paged else {}),
        "output_dir": str(scratch),
        "max_steps": job.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": stage.learning_rate,
        "adam_beta1": stage.betas[0],
        "adam_beta2": stage.betas[1],
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "seed": job.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": stage.checkpoint_every or math.ceil(job.steps / 10),
        "bf16": False,
        "gradient_checkpointing": stage.activation_checkpointing,
        "use_cpu": stage.resources.gpus == 0,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
    }
