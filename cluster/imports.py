"""Importing large libraries at the start of a process."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def importing() -> Iterator[None]:
    """Import torch, transformers and PEFT in two thirds of the time, and keep them out of the collector's way.

    They make 600,000 objects that stay. Python's collector of cycles would go through those there are again and again
    while more come, and later on at each of its full collections, 0.2 s a time. So it rests meanwhile, and never looks
    at what is there at the end: what may become garbage, such as a model's weights, is to be made outside.

    A library's function that torch would compile stays as it is written: PEFT imports bitsandbytes wherever that is
    installed, which for a few functions would load torch's compiler (0.8 s), and on a CPU would run it in the first of
    them.
    """
    collects, before, known = gc.isenabled(), os.environ.get(_NO_COMPILER), len(sys.modules)
    gc.disable()
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_COMPILER, None)
        else:
            os.environ[_NO_COMPILER] = before
        if len(sys.modules) > known:
            gc.freeze()
        if collects:
            gc.enable()
