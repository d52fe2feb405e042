"""A Hugging Face decoder as the engine uses it: one forward for tokens of any rows, over a paged cache.

Shapes: T tokens of a forward, V tokens of the vocabulary.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...cluster.errors import InputError
from .blocks import BLOCK
from .cache import Batch, PagedCache
from .device import PROMPT_TOKENS as DEVICE_PROMPT_TOKENS
from .device import DeviceForward, Places
from .device_llama import DeviceLlama
from .experts import EngineExperts, replace_experts
from .linear import EngineLinear, Shared
from .llama import LlamaForward, fits
from .lora import LoraBank
from .norms import replace_norms

PROMPT_TOKENS = 256
"""Prompt tokens of a forward on a CPU at most: longer prompts come in pieces, so that running rows do not wait."""

ROWS = 8
"""Tokens of a forward come in multiples of this, idle ones fill it up: torch computes the end of a tensor that is no
whole number of vectors with other code than the rest."""

_ATTENTIONS = {"full_attention", "sliding_attention"}
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)


class Decoder:
    """Model, cache and adapters. All methods run without gradients.

    The cache holds `rows` rows of `max_length` tokens; the last block and the table's last row belong to idle tokens.
    Raises `InputError` for a folder that is not a decoder-only model in safetensors, and for an architecture whose
    forward through the cache does not give the logits of its plain forward.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: int,
        max_length: int,
        dtype: Literal["float32", "bfloat16"],
        device: str,
        threads: int,
    ) -> None:
        self.model: Any = _load(folder, getattr(torch, dtype)).to(device)
        self.device = torch.device(device)
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, limit)
        self.vocabulary: int = config.vocab_size
        self._name = type(self.model).__name__
        _check_attention(config, self._name)
        self._sliding: int | None = getattr(config, "sliding_window", None)
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        self._shared = Shared(threads, on_device=self.device.type != "cpu")
        self.blocks_per_row = -(-self.max_length // BLOCK)
        self.blocks = rows * self.blocks_per_row
        self._layers: dict[str, EngineLinear] = {}
        self._experts: list[EngineExperts] = []
        self._fast: LlamaForward | DeviceLlama | None = None
        self._device: DeviceForward | None = None
        self.prompt_tokens = PROMPT_TOKENS if self.device.type == "cpu" else DEVICE_PROMPT_TOKENS
        """Tokens of prompts that a forward may have."""
        self._rows = rows
        self._released: dict[str, EngineLinear] = {}
        """By the name of their weight, layers that keep it in packed form alone."""
        self._cache = self._proven_cache()
        self._release_originals()
        self.adapters = LoraBank(self._layers)

    @torch.inference_mode()
    def forward(self, batch: Batch, wanted: Sequence[int], newest: int = 0) -> torch.Tensor:
        """Store the batch's tokens in the cache; the logits `[len(wanted), V]` float32 after those at these places.

        The first `newest` tokens are those of running rows, the others of prompts. A token's numbers depend on its own
        row alone. On a GPU the logits of running rows are good until the next call.
        """
        self._cache.settle()
        if self._device:
            return self._device(batch, wanted, newest, self.blocks, self._shared.layout)
        batch = _filled(batch, self.blocks)
        self._shared.adapters = batch.adapters if (batch.adapters >= 0).any() else None
        if isinstance(self._fast, LlamaForward):
            return self._fast(batch, wanted).float()
        self._cache.begin(batch)
        logits = self.model(
            input_ids=torch.from_numpy(batch.tokens).to(self.device)[None],
            position_ids=torch.from_numpy(batch.positions).to(self.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self.device),
        ).logits
        return logits[0].float()

    def _on_places(self, places: Places, adapted: bool) -> torch.Tensor:
        """The logits of one shape of a GPU's forward."""
        self._shared.adapters = places.adapters if adapted else None
        self._cache.begin(places)
        if isinstance(self._fast, DeviceLlama):
            return self._fast(places)
        logits = self.model(
            input_ids=places.tokens.long()[None],
            position_ids=places.positions.long()[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=places.wanted.long(),
        ).logits
        return logits[0].float()

    def copy_blocks(self, source: list[int], to: list[int]) -> None:
        """Copy whole blocks of the cache before the next forward."""
        self._cache.copy(source, to)

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Replace all weights, by the names of the state dict. Raises `InputError` and changes nothing when a name or
        shape is unknown or a weight is missing (tied weights need only one of their names)."""
        for name, array in tensors.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise InputError(f"the weights have {name}, which {self._name} does not")
            if tuple(parameter.shape) != array.shape:
                raise InputError(f"{name} has the shape {array.shape}, the model's is {tuple(parameter.shape)}")
        given = {id(self._parameters[name]) for name in tensors}
        missing = [name for name, parameter in self._parameters.items() if id(parameter) not in given]
        if missing:
            raise InputError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
        with torch.inference_mode():
            for name, array in tensors.items():
                if layer := self._released.get(name):
                    layer.pack(_tensor(array))
                else:
                    self._parameters[name].copy_(_tensor(array))
            for name, layer in self._layers.items():
                layer.take_bias() if f"{name}.weight" in self._released else layer.pack()
            for experts in self._experts:
                experts.pack()

    def _proven_cache(self) -> PagedCache:
        """Build the cache, put the engine's layers in, and prove on a few tokens that nothing but rounding changed."""
        try:
            return self._probe()
        except _FORWARD_ERRORS as error:
            raise InputError(
                f"the native engine cannot run {self._name}: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error

    @torch.inference_mode()
    def _probe(self) -> PagedCache:
        from transformers import DynamicCache

        size = min(self.max_length, self._sliding + 4 if self._sliding and self._sliding <= 64 else 8)
        tokens = (np.arange(size) * 7 + 3) % self.vocabulary
        states = DynamicCache()
        ids = torch.from_numpy(tokens)[None].to(self.device)
        wanted = self.model(input_ids=ids, past_key_values=states, use_cache=True).logits[0].float()
        self._cache = PagedCache(states, self.blocks + 1, self.max_length, self._shared.memory)
        self._put_in_layers()
        self.model.set_attn_implementation(self._cache.name)
        self._fast = self._fewer_calls()
        if self._shared.on_device:
            config = self.model.config.get_text_config(decoder=True)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            shared = config.num_attention_heads // heads
            self._device = DeviceForward(self._on_places, self._rows - 1, self.blocks_per_row, shared, self.device)
        table = np.arange(self.blocks_per_row, dtype=np.int32)[None]
        got: list[torch.Tensor] = []
        middle = min(size // 2, ROWS)
        # As it comes later: a first piece of several tokens, then one at a time.
        for begin, end in [(0, middle), *((i, i + 1) for i in range(middle, size))]:
            places = np.arange(begin, end)
            batch = Batch(tokens[begin:end], places, 0 * places, table, 0 * places - 1)
            got.append(self.forward(batch, range(end - begin)))
        difference = (torch.cat(got) - wanted).abs().max() / wanted.abs().max()
        if not difference < (0.01 if self.model.dtype == torch.float32 else 0.1):
            raise ValueError(f"its logits differ by {float(difference):.1%} from a plain forward")
        return self._cache

    def _fewer_calls(self) -> LlamaForward | DeviceLlama | None:
        if not fits(self.model):
            return None
        if not self._shared.on_device:
            return LlamaForward(self.model, self._cache)
        return DeviceLlama(self.model, self._cache, self.max_length)

    def _put_in_layers(self) -> None:
        """Replace linear layers and norms by the engine's; the head computes in float32, where bfloat16 would tie."""
        replace_norms(self.model)
        self._experts = replace_experts(self.model, self._shared)
        head = self.model.get_output_embeddings()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, Conv1D) or type(module) is nn.Linear:
                layer = EngineLinear(module, self._shared, torch.float32 if module is head else None)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer)
                self._layers[name] = layer
        if head is not None and self.model.get_output_embeddings() is head and self.model.dtype != torch.float32:
            raise NotImplementedError("its output layer is not linear, and bfloat16 logits are too coarse")

    def _release_originals(self) -> None:
        """Packed weights need their originals no more, unless another module has them too (a tied head)."""
        users = Counter(id(parameter) for parameter in self._parameters.values())
        for layer_name, layer in self._layers.items():
            name = f"{layer_name}.weight"
            if users[id(layer.weight)] == 1 and layer.release():
                self._parameters[name] = layer.weight
                self._released[name] = layer


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Weights as a tensor over the same memory, which nobody writes to: it may be the object store's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _filled(batch: Batch, idle_block: int) -> Batch:
    """The batch with idle tokens up to a multiple of `ROWS`; they belong to a row of their own with its own block."""
    missing = -len(batch.tokens) % ROWS
    if not missing:
        return batch
    idle = np.full((1, batch.tables.shape[1]), idle_block, np.int32)
    zeros = np.zeros(missing, np.int64)
    return Batch(
        tokens=np.concatenate([batch.tokens, zeros]),
        positions=np.concatenate([batch.positions, zeros]),
        rows=np.concatenate([batch.rows, zeros + len(batch.tables)]),
        tables=np.concatenate([batch.tables, idle]),
        adapters=np.concatenate([batch.adapters, zeros - 1]),
    )


def _load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(f"{folder} holds {config.architectures}: the native engine runs decoder-only models")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} cannot be loaded as a language model: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False)


def _check_attention(config: Any, name: str) -> None:
    """Raises `InputError` for layers that are not attention, and for positions that depend on other rows."""
    _check_rope(config, name)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - _ATTENTIONS:
        raise InputError(f"the native engine cannot run {name}: its layers are {sorted(kinds)}, not only attention")


def _check_rope(config: Any, name: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {str(s.get("rope_type")) for s in settings} & _BATCH_DEPENDENT_ROPE
    if kinds:
        raise InputError(
            f"the native engine cannot run {name}: with {kinds.pop()} RoPE a row depends on the longest row beside it"
        )
