"""Which side of a split a row is on. Imports neither ray nor torch."""

import hashlib
import json

from ..stages import SplitConfig
from .files import Row


def on_side(row: Row, config: SplitConfig) -> bool:
    """Whether a row, as its file has it, is on the side that is taken.

    A digest of its content and the seed decides: copies of a row never part, other rows do not matter, and a file read
    as another kind of rows (to train on, to evaluate on) is split the same.
    """
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(f"{config.seed} {content}".encode(errors="surrogatepass"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < config.held_out * 2**64
    return held_out == (config.take == "held_out")
