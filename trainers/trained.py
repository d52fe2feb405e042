"""What a stage on Ray Train leaves of an adapter: a PEFT folder, or that merged into a new base.

Engines add plain low-rank factors to single rows; `served_per_row` says which parametrisations are that. The others are
saved just as well, and then merged, or stay a folder for PEFT alone.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.weights import Tensors, load_adapter, save_adapter
from .adapters import export_weights, open_base, save_model
from .stages.adapters import AnyAdapter, PissaConfig, served_per_row


def save_trained(model: Any, adapter: AnyAdapter | None, root: Path, provenance: dict[str, Any]) -> Path:
    """Write the adapter of a model as `root/<digest>`, where PEFT and, of plain factors, our engines read it.

    `adapter` is the stage's own block; without one training went on with a plain adapter. `provenance` is what
    `save_adapter` takes.
    """
    if adapter is None or (served_per_row(adapter) and not isinstance(adapter, PissaConfig)):
        tensors, config = export_weights(model)
    elif isinstance(adapter, PissaConfig) and served_per_row(adapter):
        tensors, config = _pissa_as_lora(*export_weights(model), model.pissa_start)
    else:
        tensors, config = _as_peft_writes(model)
    return save_adapter(root, tensors, config, provenance)[1]


def merge_trained(base: Path, folder: Path, out: Path) -> Path:
    """Write base + adapter, added in float32 to the base as it is on disk, as an ordinary model folder."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(open_base(base), str(folder))
    return save_model(model.merge_and_unload(safe_merge=True), base, out)


def _as_peft_writes(model: Any) -> tuple[Tensors, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as scratch:
        model.save_pretrained(scratch, selected_adapters=["default"])
        tensors, config = load_adapter(Path(scratch))
    return tensors, config | {"base_model_name_or_path": None}


def _pissa_as_lora(tensors: Tensors, config: dict[str, Any], start: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """The change s (B A − B₀ A₀) of the whole base as one LoRA of twice the rank and the same scale s = alpha / r."""
    joined = {}
    for name, tensor in tensors.items():
        if name.endswith("lora_A.weight"):
            joined[name] = np.concatenate([tensor, start[name]])
        else:
            joined[name] = np.concatenate([tensor, -start[name]], axis=1)
    doubled = {key: 2 * config[key] for key in ("r", "lora_alpha")}
    return joined, config | doubled | {"init_lora_weights": True}
