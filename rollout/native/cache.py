"""The engine's paged key-value cache, and the attention that reads it, as transformers' cache and attention interfaces.

A forward takes T tokens of any rows side by side, as a batch of one sequence; `Batch` says whose they are. Every layer
first stores the new states of all tokens, then each token attends to its own row's places up to its own, so a prompt
may come in pieces, and a row may read blocks that another row of the same forward fills.

Shapes: T tokens, H heads, K key-value heads, D head dimensions, N blocks of B tokens, M blocks a row can have.
"""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from . import attention
from .attention import Scratch, padded
from .blocks import BLOCK
from .kernels import as_array
from .memory import HugePages

if TYPE_CHECKING:
    from .device import Places


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward."""

    tokens: np.ndarray
    """`[T]` int64."""
    positions: np.ndarray
    """`[T]` int64: each token's place in its row."""
    rows: np.ndarray
    """`[T]` int64: each token's row in `tables`."""
    tables: np.ndarray
    """`[rows, M]` int32: the blocks of each row, in order."""
    adapters: np.ndarray
    """`[T]` int64: each token's adapter by its number in the bank, -1 for none."""


class PagedCache(Cache):
    """All layers' blocks, sized like the states of a probe: whatever heads and dimensions the model has.

    `name` is what the model's configuration calls the attention that reads this cache.
    """

    def __init__(self, probe: DynamicCache, blocks: int, places: int, memory: HugePages) -> None:
        states: list[Any] = probe.layers
        super().__init__(layers=[PagedLayer(layer.keys, layer.values, blocks, memory) for layer in states])
        self.name = f"raylign-paged-{id(self)}"
        self._places = places
        self._scratches: dict[tuple[int, ...], Scratch] = {}
        self._batch: Any = None
        """Whose the tokens are: a `Batch`, on a GPU its `Places`."""
        self._copies: dict[int, int] = {}
        """Blocks to be filled, and from which."""
        attend = weakref.WeakMethod(self.attend)  # the registry must not keep an engine's memory alive
        AttentionInterface.register(self.name, lambda *states, **settings: attend()(*states, **settings))  # pyright: ignore[reportOptionalCall]
        weakref.finalize(self, AttentionInterface._global_mapping.pop, self.name, None)

    def begin(self, batch: "Batch | Places") -> None:
        """Tell whose the tokens of the coming forward are, and where it runs."""
        self._batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the tokens' states `[1, K, T, D]`; `attend` finds them in the cache."""
        assert self._batch is not None
        self.layer(layer_idx).store(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), self._batch)
        return key_states, value_states

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        *, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
        s_aux: Any = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention of `query` `[1, H, T, D]` over each token's row: `[1, T, H, D]`, by transformers' interface."""
        if s_aux is not None:
            raise NotImplementedError("attention sinks")
        assert self._batch is not None
        layer, q = self.layer(module.layer_idx), query[0].transpose(0, 1)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        limits = (scale, sliding_window or 0, softcap or 0.0)
        if isinstance(self._batch, Batch):
            out = layer.attend_on_cpu(q.float().contiguous(), self._batch, *limits, self.scratch(layer, q.shape[1]))
        else:
            out = layer.attend_on_device(q.contiguous(), self._batch, *limits)
        return out.to(query.dtype)[None], None

    def copy(self, source: list[int], to: list[int]) -> None:
        """Copy whole blocks, all together before the next forward; of two copies to a block the later counts."""
        self._copies.update(zip(to, source, strict=True))

    def settle(self) -> None:
        """Make the copies that were asked for: a block is read as it was before all of them."""
        if not self._copies:
            return
        pair = torch.tensor([list(self._copies), list(self._copies.values())])
        to, source = pair.to(self.layer(0).keys.device)
        for layer in self._each():
            layer.keys[to], layer.values[to] = layer.keys[source], layer.values[source]
        self._copies.clear()

    def scratch(self, layer: "PagedLayer", heads: int) -> Scratch:
        """Memory for the attention of a layer with so many query heads; layers take turns."""
        sizes = (heads // layer.keys.shape[1], layer.keys.shape[2], layer.values.shape[3])
        if sizes not in self._scratches:
            self._scratches[sizes] = Scratch(self._places, *sizes)
        return self._scratches[sizes]

    def layer(self, number: int) -> "PagedLayer":
        """One layer's blocks."""
        return self._each()[number]

    def _each(self) -> list["PagedLayer"]:
        return self.layers  # pyright: ignore[reportReturnType]


class PagedLayer(CacheLayerMixin):
    """One layer's blocks: `keys` `[N, K, D, B]` and `values` `[N, K, B, E]`, as `attention` wants them."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, blocks: int, memory: HugePages) -> None:
        super().__init__()
        _, heads, _, size = keys.shape
        self._size = values.shape[-1]
        self.keys: torch.Tensor = _zeros((blocks, heads, size, BLOCK), keys, memory)  # pyright: ignore
        self.values: torch.Tensor = _zeros((blocks, heads, BLOCK, padded(self._size)), keys, memory)  # pyright: ignore
        self.is_initialized = True

    def store(self, k: torch.Tensor, v: torch.Tensor, batch: "Batch | Places") -> None:
        """Write states `[T, K, D]` to their tokens' places."""
        if isinstance(batch, Batch):
            attention.store(*(as_array(x) for x in (self.keys, self.values, k, v)), *_places(batch))
        else:
            from .device_kernels import store

            store(k.contiguous(), v.contiguous(), self.keys, self.values, batch)

    def attend_on_cpu(
        self, q: torch.Tensor, batch: Batch, scale: float, window: int, cap: float, scratch: Scratch
    ) -> torch.Tensor:
        """Each token by itself, `[T, H, D]` float32."""
        out = torch.empty((*q.shape[:2], self._size))
        limits = (np.float32(scale), window, np.float32(cap))
        keys, values = as_array(self.keys), as_array(self.values)
        attention.attend(q.numpy(), keys, values, *_places(batch), *limits, out.numpy(), *scratch.arrays)
        return out

    def attend_on_device(
        self, q: torch.Tensor, places: "Places", scale: float, window: int, cap: float
    ) -> torch.Tensor:
        """The same on a GPU, in the type of the queries."""
        from .device_kernels import attend

        return attend(q, self.keys, self.values, self._size, places, scale, window, cap)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not asked for: `PagedCache.update` stores."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the blocks exist from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used: the attention needs no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No single length: positions are given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """No single length either."""
        return -1


def _places(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return batch.rows, batch.positions, batch.tables


def _zeros(shape: tuple[int, ...], like: torch.Tensor, memory: HugePages) -> torch.Tensor:
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(memory.zeros(shape, np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(memory.zeros(shape, np.float32))
