"""The layers that a model repeats, which are sharded, and computed again in the backward, one by one."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ...cluster.errors import InputError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers as transformers marks them, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations(model: nn.Module) -> None:
    """Keep only what goes into each layer for the backward, and compute the layer again there (1604.06174).

    transformers' own switch does nothing in evaluation mode, in which a policy computes. Raises `InputError` where the
    architecture marks no layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise InputError(f"activation_checkpointing: {type(model).__name__} marks no layers; leave it out")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
