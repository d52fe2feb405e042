"""Weights as content: digests, adapter folders, the versions a run publishes, and how they travel.

A digest names what the bytes are; a version says when a run made them. Both travel with every sample and every answer.
"""

from .collective import Collective, open_transport
from .digests import Tensors, adapter_digest, base_digest, model_digest, tensors_digest, version_digest
from .folders import load_adapter, save_adapter
from .transport import Channel, ObjectStore, Parcel, Transport
from .versions import WeightStore, WeightVersion

__all__ = [
    "Channel",
    "Collective",
    "ObjectStore",
    "Parcel",
    "Tensors",
    "Transport",
    "WeightStore",
    "WeightVersion",
    "adapter_digest",
    "base_digest",
    "load_adapter",
    "model_digest",
    "open_transport",
    "save_adapter",
    "tensors_digest",
    "version_digest",
]
