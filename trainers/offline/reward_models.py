"""Reward models of whole answers (TRL's RewardTrainer) and of steps (no trainer of TRL's: transformers' own loss)."""

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .collators import padded_rows
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
