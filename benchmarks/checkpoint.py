"""What a checkpoint costs: how long a learner is held by it, and how fast the file is written beside its work.

A state is random weights and their two moments in fp32, the sizes of a Llama model. Held: until the state has been
copied, against the same files waited for, and against torch's own `dcp.async_save`, which copies too. Written: the
file, its SHA-256 and its fsync, against the same number of bytes written and synced as they are.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arena import Arena
from .measured import Case, Contest, Measured
from .models import SHAPES

if TYPE_CHECKING:
    from torch import Tensor

_PIECE_BYTES = 16 << 20


def cases() -> list[Case]:
    """Of 120M parameters, 1.4 GB."""
    return _cases("120M")


def quick_cases() -> list[Case]:
    """Of 1M parameters."""
    return _cases("1M")


def _cases(size: str) -> list[Case]:
    held, written = "bytes per second that it is held", "bytes per second until they are on the disk"
    return [
        _case(f"{size}-held-vs-waiting", "the same, waited for", held, partial(_contest, size, _held, _waited)),
        _case(f"{size}-held-vs-dcp", "dcp.async_save", held, partial(_contest, size, _held, _by_dcp)),
        _case(f"{size}-written-vs-plain", "write and fsync", written, partial(_contest, size, _waited, _plain)),
    ]


def _case(name: str, peer: str, unit: str, make: Any) -> Case:
    return Case(name=name, peer=peer, unit=unit, group="checkpoint", make=make)


class State:
    """A learner's state and where it is written."""

    def __init__(self, size: str, root: Path) -> None:
        import torch
        from raylign.trainers.online.shards import Shards

        shape = SHAPES[size]
        matrices = [shape.head, *(shape.matrices * shape.layers)]
        self.tensors: dict[str, Tensor] = {
            f"{part}/{n}": torch.randn(rows, columns)
            for part in ("weights", "first", "second")
            for n, (rows, columns) in enumerate(matrices)
        }
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.shards, self.folder, self.root = Shards("policy", "cpu"), root / "ours", root


def _contest(size: str, ours: Any, theirs: Any, arena: Arena) -> Contest:
    state: State = arena.get(State, size, arena.root)
    return Contest(
        ours=lambda _: ours(state),
        theirs=lambda _: theirs(state),
        warm_up=lambda: (ours(state), theirs(state)),
        settings={"parameters": SHAPES[size].parameters, "bytes": state.bytes},
    )


def _measured(state: State, began: tuple[float, float]) -> Measured:
    wall, cpu = began
    return Measured(amount=state.bytes, seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def _now() -> tuple[float, float]:
    os.sync()  # what was written before is no part of it
    return time.perf_counter(), time.process_time()


def _held(state: State) -> Measured:
    began = _now()
    state.shards.begin(state.tensors, state.folder)
    measured = _measured(state, began)
    state.shards.written(wait=True)
    return measured


def _waited(state: State) -> Measured:
    began = _now()
    state.shards.begin(state.tensors, state.folder)
    state.shards.written(wait=True)
    return _measured(state, began)


def _by_dcp(state: State) -> Measured:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    began = _now()
    writing: Any = async_save(dict(state.tensors), checkpoint_id=str(state.root / "dcp"))
    measured = _measured(state, began)
    writing.result()
    return measured


def _plain(state: State) -> Measured:
    piece = os.urandom(_PIECE_BYTES)
    began = _now()
    with (state.root / "plain").open("wb") as file:
        for at in range(0, state.bytes, _PIECE_BYTES):
            file.write(piece[: state.bytes - at])
        file.flush()
        os.fsync(file.fileno())
    return _measured(state, began)
