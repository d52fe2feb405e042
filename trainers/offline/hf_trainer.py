"""Hugging Face's and TRL's trainers, set up from a stage. Imported by training workers only: it pulls in torch.

What was proven is what is trained: rows arrive as tokens and labels, and TRL's own preparation is off. TRL is imported
by the stages that use it: each of its trainers costs a worker seconds.
"""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from ..adapters import open_base
from ..data.template import IGNORED
from ..schedule import learning_rate
from ..stages import CptStage, DpoStage, RewardModelStage
from .stage import OfflineStage, TrainJob


class _Recipe:
    """What every stage's trainer does the recipe's way."""

    stage: OfflineStage
    steps: int

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule all stages share; it is a function of the step, so nothing of it needs saving."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, step: int) -> float:
        return learning_rate(self.stage, min(step, self.steps - 1), self.steps) / self.stage.learning_rate

    def _send_telemetry(self) -> None:
        """TRL would report model and machine to its makers; a run tells nobody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint needs no README."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """The rows are tokens already."""
        return dataset


def make_trainer(job: TrainJob, model: Any, rows: Dataset, scratch: Path) -> Trainer:
    """The trainer of a stage; checkpoints go to `scratch` first. `rows` stand in the order of the whole run."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    common = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
    match job.stage:
        case CptStage():
            trainer = _cpt(job, _options(job, scratch), common)
        case DpoStage():
            trainer = _dpo(job, _options(job, scratch), common)
        case RewardModelStage():
            trainer = _reward_model(_options(job, scratch), common)
        case _:
            trainer = _sft(_options(job, scratch), common)
    trainer.stage, trainer.steps = job.stage, job.steps
    trainer.remove_callback(PrinterCallback)
    return trainer


def _cpt(job: TrainJob, options: dict[str, Any], common: dict[str, Any]) -> Any:
    tokenizer = common["processing_class"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    kind = type("CptTrainer", (_Recipe, Trainer), {})
    return kind(args=TrainingArguments(**options), data_collator=collate, **common)


def _sft(options: dict[str, Any], common: dict[str, Any]) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    kind = type("SftTrainer", (_Recipe, SFTTrainer), {})
    return kind(args=SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **options), **common)


def _dpo(job: TrainJob, options: dict[str, Any], common: dict[str, Any]) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    assert isinstance(job.stage, DpoStage)
    # With an adapter TRL keeps a frozen copy of it as the reference: the policy as the stage began.
    reference = None if job.stage.adapter or job.adapter else open_base(job.base)
    kind = type("DpoTrainer", (_Recipe, DPOTrainer), {})
    return kind(args=DPOConfig(beta=job.stage.beta, max_length=None, **options), ref_model=reference, **common)


def _reward_model(options: dict[str, Any], common: dict[str, Any]) -> Any:
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

    tokenizer = common["processing_class"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = DataCollatorForPreference(pad_token_id=pad)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sides = ("chosen_ids", "rejected_ids")
        return padded([{side: row["prompt_ids"] + row[side] for side in sides} for row in rows])

    kind = type("RewardModelTrainer", (_Recipe, RewardTrainer), {})
    args = RewardConfig(max_length=None, remove_unused_columns=False, **options)
    return kind(args=args, data_collator=collate, **common)


def _options(job: TrainJob, scratch: Path) -> dict[str, Any]:
    """The training arguments all trainers share."""
    stage = job.stage
    share = stage.batch_size // stage.workers
    micro = stage.micro_batch_size or share
    return {
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
        "gradient_checkpointing": False,
        "use_cpu": stage.resources.gpus == 0,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
    }
