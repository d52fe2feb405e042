"""The engine's key-value cache: one row a slot, any length per row, no padding.

Shapes: S slots, k running rows, H key-value heads, L tokens, D head dimensions; keys and values are `[S, H, L, D]`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

Prefix = list[tuple[torch.Tensor, torch.Tensor]]
"""The keys and values `[1, H, P, D]` of a prompt, layer by layer."""


@dataclass(slots=True)
class Step:
    """Where the rows of one decoding step write, and how much of the cache they read."""

    rows: torch.Tensor
    """`[k]`: 0 … k-1."""
    positions: torch.Tensor
    """`[k]`: the place of each row's new token."""
    window: int
    """Tokens that are read, at least the longest row's."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values; a forward of k rows and one token each writes and reads the first k slots."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self.is_initialized = True
        self.step: Step | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the slots exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new token's `[k, H, 1, D]` states and return all that the step may read, `[k, H, window, D]`."""
        step = self.step
        assert step is not None
        self._keys[step.rows, :, step.positions] = key_states[:, :, 0]
        self._values[step.rows, :, step.positions] = value_states[:, :, 0]
        rows = len(step.rows)
        return self._keys[:rows, :, : step.window], self._values[:rows, :, : step.window]

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy a prompt's `[1, H, P, D]` states to the start of the rows."""
        self._keys[rows, :, : keys.shape[2]] = keys
        self._values[rows, :, : values.shape[2]] = values

    def move(self, to: torch.Tensor, source: torch.Tensor, length: int) -> None:
        """Copy the first `length` tokens of the rows `source` to the rows `to`."""
        self._keys[to, :, :length] = self._keys[source, :, :length]
        self._values[to, :, :length] = self._values[source, :, :length]

    def clear(self, rows: torch.Tensor) -> None:
        """Zero rows, so that no NaN of a past one is left behind a mask."""
        self._keys[rows] = 0
        self._values[rows] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only asked for masks that transformers makes; the engine brings its own."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No single length: positions are given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """Tokens a slot holds."""
        return self._keys.shape[2]


class SlotCache(Cache):
    """All layers' slots, sized like the states of a probe: whatever heads and dimensions the model has."""

    def __init__(self, probe: Prefix, slots: int, length: int) -> None:
        super().__init__(layers=[SlotLayer(_slots(k, slots, length), _slots(v, slots, length)) for k, v in probe])

    def _each(self) -> list[SlotLayer]:
        return self.layers  # pyright: ignore[reportReturnType]

    def begin(self, step: Step) -> None:
        """Tell the layers where the coming forward writes and reads."""
        for layer in self._each():
            layer.step = step

    def write(self, slots: list[int], prefix: Prefix) -> None:
        """Copy a prompt's states to the start of some slots."""
        rows = torch.tensor(slots, device=prefix[0][0].device)
        for layer, (keys, values) in zip(self._each(), prefix, strict=True):
            layer.write(rows, keys, values)

    def move(self, to: list[int], source: list[int], length: int) -> None:
        """Copy rows to other slots, up to `length` tokens."""
        layers = self._each()
        device = layers[0]._keys.device
        target, origin = torch.tensor(to, device=device), torch.tensor(source, device=device)
        for layer in layers:
            layer.move(target, origin, length)

    def clear(self, slots: list[int]) -> None:
        """Zero slots."""
        rows = torch.tensor(slots, device=self._each()[0]._keys.device)
        for layer in self._each():
            layer.clear(rows)


def _slots(like: torch.Tensor, slots: int, length: int) -> torch.Tensor:
    # Zeros, not empty memory: a masked place must hold a finite number, since 0 times NaN is NaN.
    _, heads, _, dim = like.shape
    return torch.zeros((slots, heads, length, dim), dtype=like.dtype, device=like.device)


def prefix_of(cache: DynamicCache) -> Prefix:
    """The keys and values that a prompt's own forward left in an ordinary cache."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
