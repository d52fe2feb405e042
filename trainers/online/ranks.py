"""The processes that hold one model together: its weights in shards (FSDP2) or all of them each, and a part of every
update's rows.

Loss and gradient are sums over ranks of shares of the whole update, so they do not depend on how many there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...cluster.process_group import Seat, take
from ..stages.learners import LearnerResources
from .batch import TrainSample, rank_batches
from .layers import decoder_layers, recompute_activations
from .prefixes import Bundle, Packing

_T = TypeVar("_T")


class Ranks:
    """This process as a rank of a group, or alone, without a group. What all ranks must call together says so."""

    def __init__(self, device: str, seat: Seat | None = None) -> None:
        self.device = device
        self.rank, self.size = (seat.rank, seat.size) if seat else (0, 1)
        if seat:
            take(seat, device)

    @property
    def leads(self) -> bool:
        """Whether it is this rank that writes files and publishes."""
        return self.rank == 0

    def spread(self, model: nn.Module, resources: LearnerResources) -> nn.Module:
        """The model on this rank's device, which keeps a shard of every parameter or all; all call it."""
        if resources.activation_checkpointing:
            recompute_activations(model)
        if self.size == 1 or not resources.shard:
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self.device, (self.size,))
        for part in [*decoder_layers(model), model]:
            sharded = fully_shard(part, mesh=mesh)
            assert isinstance(sharded, FSDPModule)
            sharded.set_gradient_divide_factor(1.0)  # the shares are of the whole update: they are added up
            sharded.set_force_sum_reduction_for_comms(True)
        return model

    def batches(self, samples: Sequence[TrainSample], packing: Packing) -> list[tuple[list[Bundle], bool]]:
        """The micro-batches of this rank, as many as every rank has, of samples that all ranks know, and whether they
        count."""
        tokens = sum(row.length for sample in samples for row in sample.rows)
        bundles = packing.bundles(samples, at_most=tokens // (2 * self.size) if self.size > 1 else tokens)
        # a mask is for all rows of a forward, and hides from those of one sample what only layers know: their window
        kinds = [bundle.kind for bundle in bundles]
        cut = rank_batches([bundle.tokens for bundle in bundles], packing.max_tokens, self.size, kinds)
        return [([bundles[i] for i in rows], counts) for rows, counts in cut[self.rank]] if cut else []

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of an update those of all ranks together, unless sharding did; all call it."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or any(isinstance(gradient, DTensor) for gradient in gradients):
            return
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):  # in one order on all ranks
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in alike])
            dist.all_reduce(flat)
            for gradient, summed in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def gathered(self, item: _T) -> list[_T]:
        """What every rank gives, in their order; all call it."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def led(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of each tensor on rank 0, and nothing elsewhere; all call it with the same names."""
        led = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor)
            if self.leads:
                led[name] = gathered
        return led


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its gradient; of a sharded one all of it, which all ranks call for together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
