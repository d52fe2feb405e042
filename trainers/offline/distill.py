"""Distillation of a teacher's distribution on given answers.

TRL's own distillation trainer learns on what the student samples while it trains; here the rows are the data's, proven
as those of `sft`, so only the loss is TRL's.
"""

from typing import Any

import torch

from ..adapters import open_base
from ..data.template import IGNORED
from ..stages import DistillStage
from .collators import collator
from .recipe_trainer import FollowsRecipe
from .stage import TrainJob

Options = dict[str, Any]


def distill(job: TrainJob, options: Options, common: Options) -> Any:
    """TRL's SFTTrainer with the divergence from a teacher as its loss."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    assert isinstance(job.stage, DistillStage)
    assert job.teacher is not None
    kind = type("DistillTrainer", (_LearnsFromTeacher, FollowsRecipe, SFTTrainer), {})
    args = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **options)
    trainer = kind(args=args, data_collator=collator(job, common), **common)
    teacher: Any = open_base(job.teacher).eval().requires_grad_(False)
    trainer.teacher = teacher.to(args.device)
    return trainer


class _LearnsFromTeacher:
    """The generalised Jensen-Shannon divergence over supervised tokens, a mean over those of the optimizer step."""

    job: TrainJob
    teacher: Any

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask_BT = inputs["labels"][:, 1:] != IGNORED
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad():
            taught = self.teacher(**given, use_cache=False).logits[:, :-1][mask_BT]
        outputs = model(**given, use_cache=False)
        loss = divergence(outputs.logits[:, -mask_BT.shape[1] - 1 : -1][mask_BT], taught, self.job.stage)
        total = mask_BT.sum() if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = loss / total
        return (loss, outputs) if return_outputs else loss


def divergence(student_NV: torch.Tensor, teacher_NV: torch.Tensor, stage: DistillStage) -> torch.Tensor:
    """Sum over N tokens of GKD's divergence (2306.13649, equation 1) between two sets of logits."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = student_NV.float(), teacher_NV.float()
    options: dict[str, Any] = {"beta": stage.beta, "temperature": stage.temperature, "reduction": "sum"}
    return GKDTrainer.generalized_jsd_loss(student, teacher, **options)
