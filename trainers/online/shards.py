"""Shards: what one rank of a learner holds, as a safetensors file that is written beside training.

Which part of which tensor a rank holds is found by the planner of torch's distributed checkpoints (DCP), whose reader
puts the parts of any number of ranks together for any other number. `dcp.save` and `dcp.load` themselves have ranks
talk about their plans: from a thread beside training, that would meet the collectives of an update. None is needed,
since every part says where in its tensor it stands.
"""

import hashlib
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from ...cluster.errors import RunFailed
from .checkpoints import Written

_PIECE_BYTES = 16 * 2**20
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class Shards:
    """Writes what a rank of the learner `name` holds, one state after the other."""

    def __init__(self, name: str, device: str, rank: int = 0) -> None:
        self._name, self._rank, pinned = name, rank, device == "cuda"
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Written] | None = None

    def begin(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Copy a state into the host's memory, and write it to `folder` from then on, while it may change.

        The memory is kept for the next time.
        """
        if self._writing:
            wait([self._writing])  # it reads the same memory
        mine = {key: tensor for key, tensor in state.items() if not self._rank or isinstance(tensor, DTensor)}
        copied: Any = self._stager.stage(mine)
        self._writing = self._thread.submit(self._write, copied, folder)

    def written(self, *, wait: bool) -> Written | None:
        """What came of the last `begin`; without `wait`, none while it is under way.

        Raises `RunFailed` where it could not be written, such as to a full disk, which another attempt would find full.
        """
        if not self._writing or not (wait or self._writing.done()):
            return None
        return self._writing.result()

    def _write(self, state: dict[str, Any], folder: Path) -> Written:
        began = time.monotonic()
        if not state:  # the first rank holds it all
            return Written(folder, {}, 0, 0.0)
        path = folder / self._name / f"shard-{self._rank:05d}.safetensors"
        try:
            digest = _write_file(state, path)
        except OSError as error:
            raise RunFailed(f"the {self._name} cannot write its checkpoint {folder}: {error.strerror}") from error
        name = path.relative_to(folder).as_posix()
        return Written(folder, {name: digest}, path.stat().st_size, time.monotonic() - began)


def sizes(folder: Path, name: str) -> dict[str, torch.Size]:
    """The tensors of a state that the ranks of `name` wrote, with their whole sizes; empty where there is none."""
    if not (folder / name).is_dir():
        return {}
    found: Any = HuggingFaceStorageReader(str(folder / name)).read_metadata().state_dict_metadata
    return {key: tensor.size for key, tensor in found.items()}


def read(state: dict[str, Tensor], folder: Path, name: str) -> None:
    """Fill these tensors, or this rank's parts of them, with what the ranks of `name` wrote."""
    reader, planner = HuggingFaceStorageReader(str(folder / name)), DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner)


def _write_file(state: dict[str, Any], file: Path) -> str:
    """Write this rank's parts as `HuggingFaceStorageReader` reads them; their SHA-256, taken on the way to the disk.

    torch's own writer makes a second copy of the state in memory first, and what is left in the stream's buffer then
    goes to the disk after its fsync.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(state, is_coordinator=True)
    parts: dict[str, Tensor] = {}
    offsets: dict[str, Any] = {}
    for item in planner.create_local_plan().items:
        part = planner.resolve_data(item)
        assert isinstance(part, Tensor), "a state holds nothing but tensors"
        assert item.tensor_data, "a part says where it stands"
        assert item.index.fqn not in parts, "a rank holds one part of a tensor"
        parts[item.index.fqn] = part.contiguous()
        offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets}
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for piece in _safetensors(parts, {CUSTOM_METADATA_KEY: json.dumps(offsets, sort_keys=True), "format": "pt"}):
            digest.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _safetensors(tensors: Mapping[str, Tensor], told: dict[str, str]) -> Iterator[memoryview | bytes]:
    """A file in pieces: the header's length, the header, and the tensors.

    Those of wide elements come first, so that all stand aligned; then by name, so that equal states are equal files.
    """
    ordered = dict(sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])))
    header: dict[str, Any] = {"__metadata__": told}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in ordered.values():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        yield from (data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES))
