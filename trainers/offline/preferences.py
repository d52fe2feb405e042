"""TRL's stable trainers of preferences: DPO and its kin on pairs, KTO on single answers."""

from typing import Any

import torch

from ..adapters import open_base
from ..stages import DpoStage, KtoStage
from ..stages.adapters import DoraConfig, LoraConfig, LoraPlusConfig, RsLoraConfig
from .recipe_trainer import FollowsRecipe, pad_token
from .stage import TrainJob

Options = dict[str, Any]


def dpo(job: TrainJob, options: Options, common: Options) -> Any:
    """TRL's DPOTrainer on pairs of token lists."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    stage = job.stage
    assert isinstance(stage, DpoStage)
    kind = type("DpoTrainer", (FollowsRecipe, DPOTrainer), {})
    losses = {"loss_type": [stage.loss], "label_smoothing": stage.label_smoothing}
    args = DPOConfig(beta=stage.beta, max_length=None, **losses, **options)
    return kind(args=args, ref_model=_reference(job), **common)


def kto(job: TrainJob, options: Options, common: Options) -> Any:
    """TRL's KTOTrainer on single answers; its KL is of a micro-batch, each prompt with its neighbour's answer."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

    stage = job.stage
    assert isinstance(stage, KtoStage)
    padded = DataCollatorForUnpairedPreference(pad_token_id=pad_token(common["processing_class"]))

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        others = [rows[-1], *rows[:-1]]
        matched = zip(rows, others, strict=True)
        return padded([row | {"KL_completion_ids": other["completion_ids"]} for row, other in matched])

    kind = type("KtoTrainer", (FollowsRecipe, KTOTrainer), {})
    args = KTOConfig(
        beta=stage.beta,
        loss_type=stage.loss,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
        max_length=None,
        **options,
    )
    return kind(args=args, ref_model=_reference(job), data_collator=collate, **common)


def _reference(job: TrainJob) -> Any:
    """The policy as the stage began.

    TRL keeps a frozen copy of a plain adapter beside it; of the others, which all start as the base or are measured
    against it (virtual tokens), it is the base, a second model.
    """
    copied = LoraConfig | RsLoraConfig | LoraPlusConfig | DoraConfig
    return None if job.adapter or isinstance(job.stage.adapter, copied) else open_base(job.base)
