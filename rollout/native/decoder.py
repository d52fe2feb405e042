"""A Hugging Face decoder as the engine uses it: one forward for a prompt, one forward for a token of many rows.

Shapes: k rows, P prompt tokens, V tokens of the vocabulary, L tokens of the cache window.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ...cluster.errors import InputError
from .cache import Prefix, SlotCache, Step, prefix_of
from .lora import LoraBank, Plan

WINDOW = 32
"""The cache is read in multiples of this many tokens: a whole number of vectors, so that how far it is read beyond a
row's own length does not change the row's bits."""

_ATTENTIONS = {"full_attention", "sliding_attention"}
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)


class Float32Head(nn.Module):
    """The output layer in float32 for a model of lower precision: logits rounded to bfloat16 would tie and drift."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._head = [head]  # in a list: its parameters keep their names in the model
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight32 = torch.empty(0)
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights after they changed."""
        self.weight32 = self._head[0].weight.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., V]`."""
        bias = self._head[0].bias
        return functional.linear(x.float(), self.weight32, None if bias is None else bias.float())


class Decoder:
    """Model, cache and adapters. All methods run without gradients.

    Raises `InputError` for a folder that is not a decoder-only model in safetensors, and for an architecture whose
    token-by-token decoding through the slots does not give the logits of its plain forward.
    """

    def __init__(
        self, folder: Path, *, slots: int, max_length: int, dtype: Literal["float32", "bfloat16"], device: str
    ) -> None:
        self.model: Any = _load(folder, getattr(torch, dtype)).to(device)
        self.device = torch.device(device)
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, limit)
        self.vocabulary: int = config.vocab_size
        self._name = type(self.model).__name__
        self._dtype = self.model.dtype
        self._sliding, self._mixed = _attention_kinds(config, self._name)
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        self._head = self._float32_head()
        self.adapters = LoraBank(self.model, self.device)
        length = -(-self.max_length // WINDOW) * WINDOW
        self._places = torch.arange(length, device=self.device)
        self._cache = self._checked_cache(slots, length)

    def _float32_head(self) -> Float32Head | None:
        if self._dtype == torch.float32:
            return None
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise InputError(f"the native engine cannot run {self._name} in bfloat16: its output layer is not linear")
        head = Float32Head(layer)
        self.model.set_output_embeddings(head)
        return head

    @torch.inference_mode()
    def prefill(self, prompt: np.ndarray, adapter: str | None) -> tuple[torch.Tensor, Prefix]:
        """The logits `[1, V]` after a prompt `[P]` and its keys and values, from a forward of its own."""
        from transformers import DynamicCache

        self.adapters.plan = None if adapter is None else Plan(single=adapter)
        cache = DynamicCache()
        tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(self.device)
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float(), prefix_of(cache)

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, positions: np.ndarray, plan: Plan | None) -> torch.Tensor:
        """Logits `[k, V]` after one new token for each of the first k slots, written at `positions` `[k]`."""
        self.adapters.plan = plan
        rows = len(tokens)
        window = (int(positions.max()) // WINDOW + 1) * WINDOW
        places = torch.from_numpy(positions).to(self.device)
        self._cache.begin(Step(torch.arange(rows, device=self.device), places, window))
        logits = self.model(
            input_ids=torch.from_numpy(tokens).to(self.device)[:, None],
            position_ids=places[:, None],
            attention_mask=self._mask(places, window),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits[:, -1].float()

    def write(self, slots: list[int], prefix: Prefix) -> None:
        """Give slots a prompt's keys and values."""
        with torch.inference_mode():
            self._cache.write(slots, prefix)

    def move(self, to: list[int], source: list[int], length: int) -> None:
        """Move rows to other slots, up to `length` tokens."""
        with torch.inference_mode():
            self._cache.move(to, source, length)

    def clear(self, slots: list[int]) -> None:
        """Zero slots that hold numbers which are not finite."""
        with torch.inference_mode():
            self._cache.clear(slots)

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
        with torch.no_grad():
            for name, array in tensors.items():
                self._parameters[name].copy_(torch.from_numpy(np.array(array, np.float32)))
        if self._head:
            self._head.refresh()

    def _mask(self, positions: torch.Tensor, window: int) -> Any:
        """What each row may read, as an additive mask `[k, 1, 1, L]`; by layer type where the model has several."""
        places = self._places[:window]
        last = positions[:, None]
        full = places <= last
        if self._sliding is None:
            return self._additive(full)
        near = self._additive(full & (places > last - self._sliding))
        return {"full_attention": self._additive(full), "sliding_attention": near} if self._mixed else near

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(~allowed, float("-inf"))[:, None, None]

    @torch.inference_mode()
    def _checked_cache(self, slots: int, length: int) -> SlotCache:
        """Build the slots and prove on a few tokens that decoding through them is the model's own forward."""
        try:
            return self._probe(slots, length)
        except _FORWARD_ERRORS as error:
            raise InputError(
                f"the native engine cannot run {self._name}: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error

    def _probe(self, slots: int, length: int) -> SlotCache:
        size = min(self.max_length, self._sliding + 4 if self._sliding and self._sliding <= 64 else 8)
        tokens = (np.arange(size) * 7 + 3) % self.vocabulary
        wanted = self.model(input_ids=torch.from_numpy(tokens)[None].to(self.device), use_cache=False).logits[0]
        first = max(1, size // 2)
        logits, prefix = self.prefill(tokens[:first], None)
        self._cache = SlotCache(prefix, slots, length)
        self._cache.write([0], prefix)
        got = [logits]
        for i in range(first, size):
            step = np.zeros((2, slots), np.int64)
            step[:, 0] = tokens[i], i
            got.append(self.decode(step[0], step[1], None)[:1])
        difference = (torch.cat(got) - wanted[first - 1 :].float()).abs().max() / wanted.float().abs().max()
        if not difference < (0.01 if self._dtype == torch.float32 else 0.1):
            raise ValueError(f"its logits differ by {float(difference):.1%} from a plain forward")
        self._cache.clear([0])
        return self._cache


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


def _attention_kinds(config: Any, name: str) -> tuple[int | None, bool]:
    """The sliding window, if layers have one, and whether layers differ in it. Raises `InputError` for other kinds."""
    _check_rope(config, name)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - _ATTENTIONS:
        raise InputError(f"the native engine cannot run {name}: its layers are {sorted(kinds)}, not only attention")
    window = getattr(config, "sliding_window", None)
    if kinds:
        return (window if "sliding_attention" in kinds else None), True
    if not getattr(config, "use_sliding_window", True):
        return None, False
    return window, False


def _check_rope(config: Any, name: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {str(s.get("rope_type")) for s in settings} & _BATCH_DEPENDENT_ROPE
    if kinds:
        raise InputError(
            f"the native engine cannot run {name}: with {kinds.pop()} RoPE a row depends on the longest row beside it"
        )
