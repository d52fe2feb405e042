"""The size of a model and of what its forward keeps, from its config alone: nothing is allocated.

The model is built on torch's meta device. What a forward keeps for its backward is found by running one on fake
tensors, which have shapes and no memory, and adding up what autograd saves: so the numbers are those of the
architecture's own code and of the attention that this device would use. Where torch was built without CUDA, a GPU is
taken to keep what a CPU's forward keeps.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...cluster.errors import InputError
from ...cluster.imports import importing

Head = Literal["full", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A low-rank adapter: its rank and the modules it is on."""

    r: int
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Elements of a model's parameters, and bytes that one forward and backward keep."""

    parameters: int
    """Of the model without an adapter; what is tied counts once."""
    linear: int
    """Those of linear layers, the head left out: what NF4 packs."""
    trained: int
    """Of the adapter, or all."""
    layers: int
    cache_per_token: int
    """Elements of keys and values that a token leaves in all layers."""
    width: int
    vocabulary: int
    activations: int = 0
    """Bytes that a forward saves for its backward, but for what is of the vocabulary's size."""
    logits: int = 0
    """Bytes of the vocabulary's size that are saved."""


def footprint(
    folder: Path,
    *,
    dtype: str,
    lora: Lora | None = None,
    rows: int = 0,
    tokens: int = 0,
    head: Head = "none",
    device: str = "cpu",
) -> Footprint:
    """Measure a model whose config.json lies in `folder`, and a forward of `rows` of `tokens` each, if there are any.

    `head` full counts the loss over logits of all tokens; with none the forward ends at the last hidden state. Raises
    `InputError` where there is no config, or the adapter has no place in it.
    """
    with importing():
        import torch

    config = _config(folder)
    model = _on_meta(config, getattr(torch, dtype))
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in _packable(model))
    if lora:
        _attach(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    activations, logits = _saved(model, text.vocab_size, rows, tokens, head, device) if rows else (0, 0)
    return Footprint(
        parameters=parameters,
        linear=linear,
        trained=trained,
        layers=text.num_hidden_layers,
        cache_per_token=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * size,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        activations=activations,
        logits=logits,
    )


def _config(folder: Path) -> Any:
    with importing():
        from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: a plan needs the model's config, and no more of it")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'} is no model config: {str(error).splitlines()[0]}") from error


def _on_meta(config: Any, dtype: Any) -> Any:
    import torch

    with importing():
        from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(f"model_type {config.model_type!r} has no causal language model: {error}") from error


def _packable(model: Any) -> list[Any]:
    """The layers that NF4 packs: bitsandbytes leaves the head and the embeddings as they are."""
    from torch import nn

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _attach(model: Any, lora: Lora) -> None:
    import torch

    with importing():
        from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of what transformers renames
            get_peft_model(model, LoraConfig(r=lora.r, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise InputError(f"adapter.targets {targets}: {str(error).splitlines()[0]}") from error


def _saved(model: Any, vocabulary: int, rows: int, tokens: int, head: Head, device: str) -> tuple[int, int]:
    """Bytes that a forward saves for its backward: those of the body, and those of the vocabulary's size."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = device if torch.backends.cuda.is_built() else "cpu"
    kept: dict[int, tuple[int, bool, Any]] = {}
    with FakeTensorMode():
        _make_fake(model, device)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def note(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:  # held on to, so that no later storage gets the same address
                kept[storage._cdata] = (storage.nbytes(), tensor.shape[-1:] == (vocabulary,), tensor)
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        mask = torch.ones_like(ids)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if head == "full":
                ending = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
            else:
                ending = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        del ending
    sizes = [(size, is_logits) for size, is_logits, _ in kept.values()]
    return sum(s for s, is_logits in sizes if not is_logits), sum(s for s, is_logits in sizes if is_logits)


def _make_fake(model: Any, device: str) -> None:
    """Put fake tensors of the device where a model has its meta tensors; what is tied stays tied."""
    import torch
    from torch import nn

    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(plain, requires_grad=tensor.requires_grad) if is_parameter else plain
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)
