"""Which blocks of the key-value cache are in use, by how many rows, and which prompt prefixes they hold.

The blocks follow vLLM's paged attention (Kwon et al. 2023, arXiv 2309.06180): rows of one prompt share its full blocks,
and a block that nobody uses keeps its content until it is needed, so that a prefix seen again costs nothing.
"""

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

BLOCK = 32
"""Tokens of a block: whole panels of the widest tile."""

Key = bytes
"""What a full block holds: a digest of the adapter and of all tokens up to the block's end."""


def prefix_keys(prompt: np.ndarray, adapter: str | None) -> Iterator[Key]:
    """The keys of a prompt's full blocks, first to last. Its last token is left out: its logits must be computed."""
    key = (adapter or "").encode()
    for end in range(BLOCK, len(prompt), BLOCK):
        key = blake2b(key + prompt[end - BLOCK : end].astype(np.int64).tobytes(), digest_size=16).digest()
        yield key


class BlockPool:
    """Counts the users of each of `size` blocks. A free block with a known prefix is reused last, oldest first."""

    def __init__(self, size: int) -> None:
        self._users = [0] * size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def free(self) -> int:
        """Blocks without a user."""
        return len(self._free)

    def take(self) -> int:
        """A block for one user; what it held is forgotten. The engine sizes the pool so that there always is one."""
        block, _ = self._free.popitem(last=False)
        if key := self._key_of.pop(block, None):
            del self._block_of[key]
        self._users[block] = 1
        return block

    def share(self, block: int) -> int:
        """The same block for one user more."""
        self._users[block] += 1
        self._free.pop(block, None)
        return block

    def release(self, block: int) -> None:
        """One user less."""
        self._users[block] -= 1
        if self._users[block]:
            return
        self._free[block] = None
        if block not in self._key_of:
            self._free.move_to_end(block, last=False)

    def find(self, key: Key) -> int | None:
        """The block that holds a prefix, for one user more; None where there is none."""
        block = self._block_of.get(key)
        return None if block is None else self.share(block)

    def remember(self, block: int, key: Key) -> None:
        """Note what a full block holds; of two blocks with one content the first is kept."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self) -> None:
        """Forget all prefixes: the weights they were computed with are gone."""
        self._block_of.clear()
        self._key_of.clear()
