"""TRL's GRPOTrainer as its users build it, on our models, and its policy update on samples that are given."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylign.trainers.online.batch import TrainSample  # pyright: ignore[reportMissingImports]

from .models import Dtype, load_model

RANK = 16


def lora() -> Any:
    """The adapter that our stages have by default."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def config_of(output: Path, **settings: Any) -> Any:
    """A `GRPOConfig` in fp32 on the CPU with DAPO's aggregation and without a KL, unless `settings` say otherwise."""
    from trl import GRPOConfig

    here = {"use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.0, "loss_type": "dapo"}
    return GRPOConfig(output_dir=str(output), **here | {"epsilon_high": 0.28, "max_grad_norm": 1.0} | settings)


def trainer(folder: Path, *, adapter: bool, dtype: Dtype = "fp32", device: str = "cpu", **settings: Any) -> Any:
    """A trainer without data of its own; `settings` go to `GRPOConfig`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOTrainer

    logging.getLogger("trl").setLevel(logging.ERROR)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))
    config = config_of(folder / "trl", use_cpu=device == "cpu", **settings)
    return GRPOTrainer(
        model=load_model(folder, dtype, device),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * config.generation_batch_size}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="a"),
        peft_config=lora() if adapter else None,
    )


class TrlUpdate:
    """A policy update by TRL's loss path: `compute_loss` of each micro-batch, backward, clipping, AdamW."""

    def __init__(
        self, folder: Path, *, adapter: bool, rows: int, micro_rows: int, checkpointing: bool, **where: Any
    ) -> None:
        self.parts = rows // micro_rows
        self.trainer = trainer(
            folder,
            adapter=adapter,
            **where,
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=self.parts,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-6,
        )
        self.trainer.current_gradient_accumulation_steps = self.parts
        self.trainer.model.train()
        self.optimizer = self.trainer.create_optimizer()
        self.trained = [p for p in self.trainer.model.parameters() if p.requires_grad]

    def update(self, batch: dict[str, Any]) -> None:
        """One optimizer step on what `padded` gave."""
        self.backward(batch)
        self.trainer.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.trainer.model.zero_grad()

    def backward(self, batch: dict[str, Any]) -> None:
        """Add the gradient of the batch."""
        from trl.trainer.utils import split_tensor_dict

        for part in split_tensor_dict(batch, self.parts):
            self.trainer.compute_loss(self.trainer.model, part).backward()


def padded(samples: Sequence[TrainSample], device: str = "cpu") -> dict[str, Any]:
    """Samples as `GRPOTrainer` has them after generation: prompts padded on the left, completions on the right, each
    to the longest of all."""
    import torch
    from trl.trainer.utils import pad

    prompts = [torch.from_numpy(s.prompt.astype("int64")) for s in samples]
    completions = [torch.from_numpy(s.tokens.astype("int64")) for s in samples]
    batch = {
        "prompt_ids": pad(prompts, padding_value=0, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(row) for row in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(completions, padding_value=0, padding_side="right"),
        "completion_mask": pad([torch.ones_like(row) for row in completions], padding_value=0, padding_side="right"),
        "advantages": torch.tensor([float(s.advantages[0]) for s in samples]),
        "num_items_in_batch": torch.tensor(float(sum(len(s.tokens) for s in samples))),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
