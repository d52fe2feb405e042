"""Weights as content: digests, adapter folders, the versions a run publishes, and how they travel.

A digest names what the bytes are; a version says when a run made them. Both travel with every sample and every answer.
"""

from .collective import Collective, open_transport
from .digests import adapter_digest, base_digest, tensors_digest, version_digest
from .folders import load_adapter, save_adapter
from .kept import keep_version, kept_version
from .pieces import Piece, Tensors, joined, tensors_of
from .transport import Channel, ObjectStore, Parcel, Transport
from .versions import WeightStore, WeightVersion

__all__ = [
    "Channel",
    "Collective",
    "ObjectStore",
    "Parcel",
    "Piece",
    "Tensors",
    "Transport",
    "WeightStore",
    "WeightVersion",
    "adapter_digest",
    "base_digest",
    "joined",
    "keep_version",
    "kept_version",
    "load_adapter",
    "open_transport",
    "save_adapter",
    "tensors_digest",
    "tensors_of",
    "version_digest",
]
