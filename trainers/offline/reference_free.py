"""ORPO and SimPO on pairs, through the trainers that TRL calls experimental: all that knows them is here."""

from typing import Any

import torch

from ..data.template import IGNORED
from ..stages import OrpoStage, SimpoStage
from .recipe_trainer import FollowsRecipe, pad_token
from .stage import TrainJob

Options = dict[str, Any]


def orpo(job: TrainJob, options: Options, common: Options) -> Any:
    """TRL's ORPOTrainer (2403.07691)."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    assert isinstance(job.stage, OrpoStage)
    args = ORPOConfig(beta=job.stage.beta, **_whole_rows(job), **options)
    return _on_tokens(ORPOTrainer, args, common)


def simpo(job: TrainJob, options: Options, common: Options) -> Any:
    """TRL's CPOTrainer with SimPO's loss (2405.14734) and no fine-tuning beside it."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    assert isinstance(job.stage, SimpoStage)
    loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": job.stage.beta, "simpo_gamma": job.stage.gamma}
    return _on_tokens(CPOTrainer, CPOConfig(**loss, **_whole_rows(job), **options), common)


def _whole_rows(job: TrainJob) -> Options:
    return {"max_length": job.stage.max_length, "remove_unused_columns": False}


def _on_tokens(trainer: type, args: Any, common: Options) -> Any:
    """The trainer on rows of tokens: both take text alone, so each is made without a row and given them afterwards."""
    from trl.experimental.utils import DPODataCollatorWithPadding

    rows, tokenizer = common["train_dataset"], common["processing_class"]
    padded = DPODataCollatorWithPadding(pad_token_id=pad_token(tokenizer))

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return padded([_as_trl_names(row) for row in batch])

    kind: Any = type(f"Proven{trainer.__name__}", (FollowsRecipe, trainer), {})
    made = kind(args=args, data_collator=collate, **common | {"train_dataset": rows.select([])})
    made.train_dataset = rows
    return made


def _as_trl_names(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """One pair as these trainers name its parts; labels are tokens of the answers alone."""
    prompt, named = row["prompt_ids"], {"prompt_input_ids": row["prompt_ids"]}
    named["prompt_attention_mask"] = [1] * len(prompt)
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_ids"]
        named[f"{side}_input_ids"] = prompt + answer
        named[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
        named[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
    return named
