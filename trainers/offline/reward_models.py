"""Reward models of whole answers (TRL's RewardTrainer) and of steps (no trainer of TRL's: transformers' own loss)."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from ..data.template import IGNORED
from .recipe_trainer import FollowsRecipe, pad_token

Options = dict[str, Any]


def reward_model(options: Options, common: Options) -> Any:
    """One number for an answer, from pairs."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

    padded = DataCollatorForPreference(pad_token_id=pad_token(common["processing_class"]))

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sides = ("chosen_ids", "rejected_ids")
        return padded([{side: row["prompt_ids"] + row[side] for side in sides} for row in rows])

    kind = type("RewardModelTrainer", (FollowsRecipe, RewardTrainer), {})
    args = RewardConfig(max_length=None, remove_unused_columns=False, **options)
    return kind(args=args, data_collator=collate, **common)


def process_reward_model(options: Options, common: Options) -> Any:
    """Right or wrong at the last token of every step: labels are 1, 0, or left out."""
    kind = type("ProcessRewardModelTrainer", (FollowsRecipe, Trainer), {})
    return kind(args=TrainingArguments(**options), data_collator=padded_rows(common["processing_class"]), **common)


def padded_rows(tokenizer: Any) -> Any:
    """A collator of rows with `input_ids` and `labels` into tensors `[B, T]`, filled up on the right."""
    pad = pad_token(tokenizer)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return collate
