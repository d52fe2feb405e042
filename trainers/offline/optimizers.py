"""Optimizers that a parametrisation asks for, in the place of the trainers' AdamW."""

from typing import Any

from ..stages.adapters import GaloreConfig, LoraPlusConfig
from .galore import GaloreAdamW
from .stage import TrainJob


def optimizer_of(job: TrainJob, model: Any) -> Any:
    """The optimizer of a stage's `adapter`, or none where the trainer's own AdamW is meant."""
    adapter = getattr(job.stage, "adapter", None)
    match adapter:
        case LoraPlusConfig():
            return _loraplus(job, adapter, model)
        case GaloreConfig():
            return _galore(job, adapter, model)
        case _:
            return None


def _loraplus(job: TrainJob, adapter: LoraPlusConfig, model: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW

    stage = job.stage
    return create_loraplus_optimizer(
        model,
        AdamW,
        lr=stage.learning_rate,
        loraplus_lr_ratio=adapter.ratio,
        betas=stage.betas,
        loraplus_weight_decay=stage.weight_decay,
    )


def _galore(job: TrainJob, adapter: GaloreConfig, model: Any) -> GaloreAdamW:
    """Matrices of the layers are projected; embeddings, head and vectors are not, as in the paper."""
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    ends = {id(parameter) for part in parts for parameter in part.parameters()}
    learned = [p for p in model.parameters() if p.requires_grad]
    inner = [p for p in learned if p.ndim == 2 and id(p) not in ends and min(p.shape) > adapter.r]
    others = [p for p in learned if all(p is not q for q in inner)]
    projected = {"params": inner, "rank": adapter.r, "update_every": adapter.update_every, "scale": adapter.scale}
    stage = job.stage
    groups = [group for group in (projected, {"params": others}) if group["params"]]
    return GaloreAdamW(groups, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay)
