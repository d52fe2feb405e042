"""What a checkpoint of some adapters needs besides what PEFT writes, so that a resume is exact.

PEFT writes an adapter as it is used: of AdaLoRA the ranks that are left, which fit no moments of all of them; of
virtual tokens the embeddings, not the network that makes them. So of these a checkpoint has the parameters themselves
in a file of its own, and of AdaLoRA what tells which ranks matter.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..stages.adapters import VIRTUAL, AdaLoraConfig
from .stage import TrainJob

_FILE = "trained_parameters.pt"
_MEASURES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Of every entry: its sensitivity, and the running means of that and of its uncertainty."""


class RankBudget(TrainerCallback):
    """Lets PEFT choose the ranks of an AdaLoRA that stay, from the gradients of each step."""

    def __init__(self, model: Any) -> None:
        self._adapted = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between the optimizer's step and the end of its gradients."""
        self._adapted.update_and_allocate(state.global_step)


def needs_more(job: TrainJob) -> bool:
    """Whether PEFT's own files of an adapter do not hold all that trains."""
    return isinstance(job.stage.adapter, (AdaLoraConfig, *VIRTUAL))


def save_state(model: Any, folder: Path) -> None:
    """Write the parameters that train, and what an AdaLoRA's budget goes by, into a checkpoint."""
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"weights": weights, "budget": _budget(model)}, folder / _FILE)


def load_state(model: Any, folder: Path) -> None:
    """Put a checkpoint's back."""
    device = next(model.parameters()).device
    kept = torch.load(folder / _FILE, map_location=device, weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in kept["weights"].items():
            parameters[name].copy_(weight)
    if kept["budget"]:
        model.peft_config["default"].rank_pattern = kept["budget"].pop("rank_pattern")
        for key, values in kept["budget"].items():
            setattr(model.base_model.rankallocator, key, values)


def _budget(model: Any) -> dict[str, Any]:
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is None:
        return {}
    pattern = model.peft_config["default"].rank_pattern
    return {"rank_pattern": pattern, **{key: getattr(allocator, key) for key in _MEASURES}}
