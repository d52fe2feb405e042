"""Models with low-rank adapters: open, export, check, merge. PEFT does the arithmetic; this is where it is called."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..cluster.errors import InputError
from ..cluster.imports import importing
from ..cluster.weights import Tensors, base_digest, load_adapter
from .parametrisations import peft_config
from .quantized import open_nf4
from .stages.adapters import AnyAdapter, LoraConfig, PissaConfig, trains_all

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


def open_model(
    base: Path, adapter: Path | None, own: AnyAdapter | None, *, seed: int, dtype: str = "float32", steps: int = 1
) -> "PreTrainedModel":
    """A base with a trainable adapter: the folder's if one is given, else a new one as `own` says, from the seed.

    Without either, or where `own` says so, all parameters train. `steps` are those of the stage, over which AdaLoRA
    shrinks ranks. Raises `InputError` where base or adapter cannot be read or do not fit.
    """
    model = open_base(base, dtype=dtype, quantize=getattr(own, "quantize", None))
    if adapter:
        check_adapter(adapter, base)
        return _attach(model, adapter)
    if own is None or trains_all(own):
        return model
    return _new_adapter(model, own, seed, steps=steps, tokenizer=base)


def open_reward_model(
    base: Path,
    own: AnyAdapter | None,
    *,
    seed: int,
    task: Literal["SEQ_CLS", "TOKEN_CLS"] = "SEQ_CLS",
    steps: int = 1,
) -> "PreTrainedModel":
    """A folder's weights under a new head, from the seed, in float32; with a new adapter if `own` asks.

    The head gives one number for a row (`SEQ_CLS`) or two for every token, of wrong and right (`TOKEN_CLS`). Raises
    `InputError` where the folder cannot be read, or its architecture has no such form.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning  # that the head is new

    kind, labels = {
        "SEQ_CLS": (AutoModelForSequenceClassification, 1),
        "TOKEN_CLS": (AutoModelForTokenClassification, 2),
    }[task]
    with torch.random.fork_rng(devices=[]), suppress_seqcls_warning():
        torch.manual_seed(seed)
        try:
            config = AutoConfig.from_pretrained(base, num_labels=labels)
            if task == "TOKEN_CLS":
                config.classifier_dropout = 0.0  # transformers' own default drops a tenth before the head
            model = kind.from_pretrained(base, config=config, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{base} cannot be made a reward model: {str(error).splitlines()[0]}") from error
    if own is None or trains_all(own):
        return model
    return _new_adapter(model, own, seed, task=task, steps=steps, tokenizer=base)


def open_scorer(folder: Path, lora: LoraConfig | None, *, seed: int, dtype: str) -> tuple["PreTrainedModel", "Tensor"]:
    """A reward model's body, trainable as in `open_model`, and the weights `[D]` of its head of one number.

    The body stands under a vocabulary's head, which is nothing but there. Raises `InputError` where the folder has no
    head of a sequence classifier.
    """
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found += [file.get_tensor(name) for name in file.keys() if name == "score.weight"]  # noqa: SIM118
    if not found:
        raise InputError(f"{folder} is not a reward model: it has no weights score.weight")
    return open_model(folder, None, lora, seed=seed, dtype=dtype), found[0][0].float()


def lora_like(adapter: Path) -> LoraConfig:
    """What a new adapter is, that is to be as large as one in a folder."""
    _, config = load_adapter(adapter)
    return LoraConfig(r=config["r"], alpha=config["lora_alpha"], targets=config["target_modules"])


def open_base(base: Path, *, dtype: str = "float32", quantize: str | None = None) -> "PreTrainedModel":
    """The model of a folder, weights from safetensors only, perhaps quantised as `LoraConfig` says.

    Raises `InputError` where there is none.
    """
    with importing():
        import torch
        from transformers import AutoModelForCausalLM

    try:
        if quantize:
            return open_nf4(base, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{base} is not a model folder: {str(error).splitlines()[0]}") from error


def random_model(base: Path, *, seed: int) -> "PreTrainedModel":
    """The architecture of a folder's config.json with fresh float32 weights from the seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise InputError(f"{base} has no model config: {str(error).splitlines()[0]}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _new_adapter(
    model: "PreTrainedModel", own: AnyAdapter, seed: int, *, steps: int, tokenizer: Path, task: str = "CAUSAL_LM"
) -> Any:
    import torch

    with importing():
        from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: Any = get_peft_model(model, peft_config(own, task, steps=steps, tokenizer=str(tokenizer)))
        except ValueError as error:
            where = f"adapter.targets {own.targets}" if isinstance(own, LoraConfig) else f"adapter {own.type}"
            raise InputError(f"{where}: {str(error).splitlines()[0]}") from error
    if isinstance(own, PissaConfig):
        made.pissa_start = export_weights(made)[0]  # what has left the base
    return made


def _attach(model: "PreTrainedModel", folder: Path) -> Any:
    with importing():
        from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


class Exporter:
    """What trains of a model as numpy arrays: of one with an adapter, its tensors under PEFT's names and `config`, its
    PEFT config; of one without, each parameter once, and `{}`.

    Made once for a model, before its parameters are sharded: PEFT takes tens of milliseconds to collect an adapter.
    What it collects is the parameters' own memory, and by that it is known which parameter has which name.
    """

    def __init__(self, model: Any) -> None:
        with importing():
            from peft import PeftModel, get_peft_model_state_dict

        own = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        adapted = isinstance(model, PeftModel)
        named = get_peft_model_state_dict(model) if adapted else dict(model.named_parameters())
        assert all(tensor.data_ptr() in own for tensor in named.values()), "PEFT collected copies"
        self._names = {name: own[tensor.data_ptr()] for name, tensor in named.items()}
        self.config: dict[str, Any] = _peft_config(model, list(self._names)) if adapted else {}

    def named(self, parameters: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """The model's parameters that train, under the names they are exported by."""
        return {name: parameters[own] for name, own in self._names.items()}


def arrays(tensors: Mapping[str, "Tensor"]) -> Tensors:
    """Tensors as contiguous arrays; of those on a CPU views, good until they change."""
    return {name: _array(tensor.detach()) for name, tensor in tensors.items()}


def export_weights(model: Any) -> tuple[Tensors, dict[str, Any]]:
    """Copies of what trains, and the PEFT config or `{}`; see `Exporter`."""
    exporter = Exporter(model)
    live = arrays(exporter.named(dict(model.named_parameters())))
    return {name: array.copy() for name, array in live.items()}, exporter.config


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
    return np.ascontiguousarray(tensor.cpu().numpy())


def _peft_config(model: Any, tensors: Iterable[str]) -> dict[str, Any]:
    """The adapter's PEFT config as plain JSON, the same for the same adapter wherever it was made."""
    config = {key: _plain(value) for key, value in model.peft_config["default"].to_dict().items()}
    targets = {name.removeprefix(_PREFIX).split(".lora_")[0] for name in tensors}
    short = {name.rsplit(".", 1)[-1] for name in targets}
    meant = {name for name, _ in model.get_base_model().named_modules() if name.rsplit(".", 1)[-1] in short}
    return config | {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(short if meant == targets else targets),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def check_adapter(folder: Path, base: Path) -> None:
    """Raise `InputError` where an adapter was made for another base: by its recorded digest, else by its shapes."""
    tensors, _ = load_adapter(folder)
    record = folder / "provenance.json"
    made_for = json.loads(record.read_text()).get("base_digest") if record.exists() else None
    if made_for and made_for != base_digest(base):
        raise InputError(
            f"adapter {folder} was trained on another base (digest {made_for[:12]}…) than {base}: "
            "give the base it was trained on"
        )
    shapes = _weight_shapes(base)
    for name, tensor in tensors.items():
        _check_shape(folder, base, name, tensor, shapes)


def _check_shape(folder: Path, base: Path, name: str, tensor: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> None:
    module, _, factor = name.removeprefix(_PREFIX).partition(".lora_")
    if not factor:
        raise InputError(f"adapter {folder} has a tensor that is no low-rank factor: {name}")
    shape = shapes.get(f"{module}.weight")
    if shape is None:
        raise InputError(f"adapter {folder} is for another base: {base} has no layer {module}")
    if factor in ("A.weight", "B.weight"):
        side, ours, theirs = (
            ("inputs", tensor.shape[1], shape[1]) if factor[0] == "A" else ("outputs", tensor.shape[0], shape[0])
        )
        if ours != theirs:
            raise InputError(
                f"adapter {folder} is for another base: {module} has {theirs} {side} in {base}, {ours} in it"
            )


def _weight_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a folder's weights, from the safetensors headers alone."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def merge_adapter(base: Path, adapter: Path, out: Path) -> Path:
    """Write base + adapter, added in float32, as an ordinary model folder with the base's tokenizer."""
    check_adapter(adapter, base)
    model = _attach(open_base(base), adapter).merge_and_unload(safe_merge=True)
    return save_model(model, base, out)


def save_reward_model(model: Any, tokenizer_of: Path, out: Path) -> Path:
    """Write what `open_reward_model` gave, its adapter merged in float32, as an ordinary model folder."""
    from peft import PeftModel

    whole = model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    return save_model(whole, tokenizer_of, out)


def save_model(model: Any, tokenizer_of: Path, out: Path) -> Path:
    """Write a model folder, all or nothing: config, safetensors, and the tokenizer of another folder."""
    from transformers import AutoTokenizer

    with open_draft(out) as draft:
        model.save_pretrained(draft, safe_serialization=True)
        AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(draft)
    return out


@contextmanager
def open_draft(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once it is written whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=".draft-"))
    try:
        yield draft
        draft.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
