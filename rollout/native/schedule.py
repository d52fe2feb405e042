"""Who takes part in a step, in which slot, and with which blocks of the cache.

Numbers only: it knows prompts, rows and blocks, and neither model nor tensors.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..records import GenerationRequest
from .blocks import BLOCK, BlockPool, prefix_keys
from .rows import Prompt, Row


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens `begin` … `end - 1` of a prompt in a step; its first slot holds its blocks' table meanwhile."""

    prompt: Prompt
    slot: int
    begin: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the prompt is complete after it."""
        return self.end == self.prompt.length


class Schedule:
    """Slots, waiting prompts and blocks. `copy` has blocks copied to as many others before the next forward.

    A step has at most `prompt_tokens` of prompts: longer ones come in pieces, so that running rows do not wait.
    """

    def __init__(
        self, slots: int, blocks: int, per_row: int, prompt_tokens: int, copy: Callable[[list[int], list[int]], None]
    ) -> None:
        self.rows: list[Row | None] = [None] * slots
        """By slot, the running row."""
        self.reserved: dict[int, Prompt] = {}
        """Slots that wait for a prompt to be computed, and which."""
        self.waiting: deque[Prompt] = deque()
        """Prompts with samples that have not begun."""
        self.tables = np.zeros((slots, per_row), np.int32)
        """`[slots, per_row]`: the blocks of each slot's row or prompt."""
        self.reused = 0
        """Prompt tokens that were found in the cache, since the start."""
        self._pool = BlockPool(blocks)
        self._prompt_tokens = prompt_tokens
        self._copy = copy

    def running(self) -> list[int]:
        """The slots of running rows."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def row(self, slot: int) -> Row:
        """The row that runs in a slot."""
        row = self.rows[slot]
        assert row is not None
        return row

    def requests(self) -> Iterator[GenerationRequest]:
        """All that wait or run; one of several rows comes several times."""
        yield from (prompt.request for prompt in self.waiting)
        yield from (row.request for row in self.rows if row is not None)

    def reserve(self) -> None:
        """Give free slots to waiting prompts, first come, first served; each gets as many as it has samples."""
        free = [slot for slot, row in enumerate(self.rows) if row is None and slot not in self.reserved]
        held = Counter(id(prompt) for prompt in self.reserved.values())
        for prompt in self.waiting:
            for _ in range(min(len(free), prompt.remaining - held[id(prompt)])):
                self.reserved[free.pop(0)] = prompt
            if not free:
                return

    def pieces(self) -> list[Piece]:
        """The next tokens of the prompts that have a slot, up to `prompt_tokens`; their blocks are taken."""
        pieces: list[Piece] = []
        room = self._prompt_tokens
        first: dict[int, tuple[int, Prompt]] = {}
        for slot, prompt in self.reserved.items():
            first.setdefault(id(prompt), (slot, prompt))
        for slot, prompt in first.values():
            if prompt.logits is None and room:
                if not prompt.begun:
                    self._begin(prompt)
                end = min(prompt.length, prompt.done + room)
                room -= end - prompt.done
                self.extend(slot, prompt.blocks, end)
                pieces.append(Piece(prompt, slot, prompt.done, end))
                self._remember(pieces[-1])
        return pieces

    def _begin(self, prompt: Prompt) -> None:
        """Take over the blocks of the longest prefix of the prompt that is in the cache."""
        prompt.begun = True
        for key in prefix_keys(prompt.request.prompt, prompt.request.adapter):
            if (block := self._pool.find(key)) is None:
                break
            prompt.blocks.append(block)
        prompt.done = BLOCK * len(prompt.blocks)
        self.reused += prompt.done

    def extend(self, slot: int, blocks: list[int], length: int) -> None:
        """Take blocks for a row or prompt up to `length` tokens, and have the slot's table name them."""
        while len(blocks) * BLOCK < length:
            blocks.append(self._pool.take())
        self.tables[slot, : len(blocks)] = blocks

    def _remember(self, piece: Piece) -> None:
        """Note the prefixes that the piece completes: the forward fills them before anybody reads them."""
        keys = prefix_keys(piece.prompt.request.prompt, piece.prompt.request.adapter)
        for i, key in enumerate(keys):
            if piece.begin < (i + 1) * BLOCK <= piece.end:
                self._pool.remember(piece.prompt.blocks[i], key)

    def forget(self) -> None:
        """Forget all prefixes: what the blocks hold is of other weights, or not known."""
        self._pool.forget()

    def enter(self, slot: int, row: Row) -> None:
        """Make a reserved slot a running row: it shares the prompt's full blocks and gets its own copy of the last."""
        prompt = self.reserved.pop(slot)
        prompt.done = prompt.length
        prompt.entered += 1
        if prompt.remaining:
            full = prompt.length // BLOCK
            row.blocks = [self._pool.share(block) for block in prompt.blocks[:full]]
            if full < len(prompt.blocks):
                row.blocks.append(self._pool.take())
                self._copy(prompt.blocks[full:], row.blocks[full:])
        else:
            row.blocks = prompt.blocks
            self.waiting.remove(prompt)
        self.tables[slot, : len(row.blocks)] = row.blocks
        self.rows[slot] = row

    def leave(self, slot: int) -> None:
        """End a running row."""
        self._release(self.row(slot).blocks)
        self.rows[slot] = None

    def remove(self, request_id: str) -> None:
        """Forget all of a request: its prompt and its rows."""
        for prompt in [p for p in self.waiting if p.request.request_id == request_id]:
            self.waiting.remove(prompt)
            self._release(prompt.blocks)
            self.reserved = {slot: p for slot, p in self.reserved.items() if p is not prompt}
        for slot in self.running():
            if self.row(slot).request.request_id == request_id:
                self.leave(slot)

    def _release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # of a prefix, the end is reused first
            self._pool.release(block)
