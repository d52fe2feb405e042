"""The engine's linear layers: weights in panels (`matmul`), and every token's own adapter on top.

Shapes: T tokens, I inputs, O outputs, r rank, n adapters.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from . import kernels, matmul
from .memory import HugePages


class Shared:
    """What all linear layers of an engine have in common. `threads` is for products on a CPU."""

    def __init__(self, threads: int = 1, *, on_device: bool = False) -> None:
        self.multiply = matmul.Products(threads)
        self.memory = HugePages()
        self.on_device = on_device
        """Whether the layers compute on a GPU."""
        self.adapters: Any = None
        """Each token's adapter in the coming forward, `[T]`; None when no token has one. On a GPU in its memory."""
        self.layout = 0
        """How often the memory of adapters on a GPU was laid out anew."""


def features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    linear: Any = layer
    return linear.in_features, linear.out_features


class EngineLinear(nn.Module):
    """Stands in for an `nn.Linear` or GPT-2's `Conv1D`, with the same names and shapes of its parameters.

    `dtype` is that of its outputs, by default the weights'.
    """

    def __init__(self, layer: nn.Module, shared: Shared, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        source: Any = layer
        self.in_features, self.out_features = features(layer)
        self.weight, self.bias = source.weight, source.bias
        self._transposed = isinstance(layer, Conv1D)
        self._dtype, self._device = dtype or source.weight.dtype, source.weight.device
        self._pairs = source.weight.dtype == torch.bfloat16 and self.in_features % 2 == 0
        self._shared = shared
        self._packed: np.ndarray | None = None
        self._hidden = np.empty(0, np.float32)
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None
        """`a` `[n, r, I]` and `b` `[n, r, O]` of all adapters, where any targets this layer."""
        self._arrays: tuple[np.ndarray, ...] = ()
        """The same memory, on a CPU."""
        self._has = np.full(1, -1)
        """By an adapter's number, its place in `factors`; -1, also at the end, where it has none."""
        self._has_there: torch.Tensor | None = None
        """The same in a GPU's memory."""
        self._plain: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        """What a GPU multiplies by and adds, where its graphs know them to lie."""
        self.pack()

    def pack(self, weight: torch.Tensor | None = None) -> None:
        """Take over new weights: these, or what the parameters hold now."""
        new: torch.Tensor = self.weight.detach() if weight is None else weight
        new = new.t().contiguous() if self._transposed else new
        if not self._shared.on_device:
            self._pack(new.to(torch.bfloat16 if self._pairs else torch.float32))
        elif self._plain is None:
            self._plain = new
        elif self._plain.data_ptr() != new.data_ptr():
            self._plain.copy_(new)  # where it lies, the graphs know
        self.take_bias()

    def move(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Have weights of the same numbers lie there, as a part of a larger product's."""
        self.weight.data = self._plain = weight
        if bias is not None:
            self.bias.data = self._bias = bias

    def _pack(self, weight: torch.Tensor) -> None:
        if self._packed is None:
            shape = matmul.panels(self.out_features, self.in_features, self._pairs)
            self._packed = self._shared.memory.zeros(shape, np.uint32 if self._pairs else np.float32)
        matmul.pack(kernels.as_array(weight), self._packed)

    def take_bias(self) -> None:
        """Take over what the bias parameter holds now."""
        if self._packed is None:
            new = None if self.bias is None else self.bias.detach().to(self._dtype)
            if self._bias is None or new is None:
                self._bias = new
            elif self._bias.data_ptr() != new.data_ptr():
                self._bias.copy_(new)
            return
        self._start = np.zeros(len(self._packed) * matmul.PANEL, np.float32)
        if self.bias is not None:
            self._start[: self.out_features] = self.bias.detach().float().numpy()

    def release(self) -> bool:
        """Give the weight parameter's memory back where the packed copy is all that is needed; its shape stays."""
        if self._packed is None:
            return False
        self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        flat = x.reshape(-1, self.in_features)
        if self._packed is not None:
            out = torch.from_numpy(self.on_arrays(kernels.as_array(flat.contiguous())))
        else:
            out = self._on_device(flat)
            self.add_adapters(flat, out)
        return out.to(self._dtype).view(*x.shape[:-1], self.out_features)

    def on_arrays(self, x: np.ndarray) -> np.ndarray:
        """`[T, I]` as `kernels.as_array` gives it to `[T, O]` in float32, before it is rounded; on a CPU."""
        assert self._packed is not None
        out = np.empty((len(x), self.out_features), np.float32)
        self._shared.multiply(self._operand(x), self._packed, self._start, out)
        if self.factors is not None and self._shared.adapters is not None:
            kernels.add_lora(x, self._has[self._shared.adapters], *self._arrays, out, self._hidden)
        return out

    def _operand(self, x: np.ndarray) -> np.ndarray:
        """The inputs as the packed weights want them."""
        if self._pairs:
            pairs = x if x.dtype == np.uint16 else kernels.as_array(torch.from_numpy(x).to(torch.bfloat16))
            return pairs.view(np.uint32)
        return x if x.dtype == np.float32 else torch.from_numpy(x).view(torch.bfloat16).float().numpy()

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        assert self._plain is not None
        if self._plain.dtype == self._dtype:
            return functional.linear(x.to(self._dtype), self._plain, self._bias)
        out = torch.mm(x.to(self._plain.dtype), self._plain.t(), out_dtype=self._dtype)
        return out if self._bias is None else out + self._bias

    def put(self, number: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take an adapter's factors `a` `[r, I]` and `b` `[O, r]` under a number of the bank's."""
        if self.factors is None or number >= len(self.factors[0]) or len(a) > self.factors[0].shape[1]:
            self._grow(number + 1, len(a))
        assert self.factors is not None
        for factors, new in zip(self.factors, (a, b.t()), strict=True):
            place = factors[number]
            if len(new) < len(place):
                place[len(new) :] = 0
                place = place[: len(new)]
            place.copy_(new)
        self._set(number, number)

    def _grow(self, count: int, rank: int) -> None:
        """Make place for `count` adapters of `rank`, beside those that are there."""
        old = self.factors
        if self._shared.on_device:
            rank = 1 << (rank - 1).bit_length()
        if old is not None:
            count, rank = max(count, len(old[0]) * 3 // 2), max(rank, old[0].shape[1])
        self._shared.layout += 1
        self.factors = (
            torch.zeros((count, rank, self.in_features), device=self._device),
            torch.zeros((count, rank, self.out_features), device=self._device),
        )
        for grown, kept in zip(self.factors, old or (), strict=False):
            grown[: len(kept), : kept.shape[1]] = kept
        if self._device.type == "cpu":
            self._arrays = tuple(factors.numpy() for factors in self.factors)
            self._hidden = np.empty(rank, np.float32)

    def remove(self, number: int) -> None:
        """The adapter of this number does not change this layer, or not any more."""
        self._set(number, -1)

    def _set(self, number: int, place: int) -> None:
        missing = number + 2 - len(self._has)
        if missing > 0:
            self._has = np.concatenate([self._has, np.full(missing, -1)])
        self._has[number] = place
        if not self._shared.on_device:
            return
        if self._has_there is None or len(self._has_there) < len(self._has):
            self._has_there = torch.full((2 * len(self._has),), -1, dtype=torch.int32, device=self._device)
            self._shared.layout += 1
        self._has_there[: len(self._has)] = torch.from_numpy(self._has)

    def add_adapters(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """On a GPU, add to `out` `[T, O]`, the layer's of `x` `[T, I]`, what each token's own adapter does."""
        if self.factors is None or self._shared.adapters is None:
            return
        from .device_kernels import add_lora

        assert self._has_there is not None
        add_lora(x, self._shared.adapters, self._has_there, *self.factors, out)


class Joined:
    """Several linear layers on a GPU that have one input, as one product."""

    def __init__(self, layers: list[EngineLinear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        with torch.inference_mode(False), torch.no_grad():  # weights are replaced in other modes, too
            self._weight = torch.cat([layer.weight.detach() for layer in layers])
            self._bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
            biases = [None] * len(layers) if self._bias is None else self._bias.split(self._sizes)
            for layer, weight, bias in zip(layers, self._weight.split(self._sizes), biases, strict=True):
                layer.move(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, I]` to `[T, O]`, the layers' outputs side by side."""
        out = functional.linear(x, self._weight, self._bias)
        for layer, part in zip(self._layers, out.split(self._sizes, dim=1), strict=True):
            layer.add_adapters(x, part)
        return out
