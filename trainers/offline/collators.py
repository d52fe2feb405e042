"""Rows with `input_ids` and `labels` as one forward's tensors: filled up to one length, or side by side."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.template import IGNORED
from .recipe_trainer import pad_token
from .stage import TrainJob

TokenRow = dict[str, list[int]]
Collator = Callable[[list[TokenRow]], dict[str, torch.Tensor]]


def collator(job: TrainJob, common: dict[str, Any]) -> Collator:
    """The stage's: `packed_rows` where it asks for `packing`."""
    return packed_rows if getattr(job.stage, "packing", False) else padded_rows(common["processing_class"])


def padded_rows(tokenizer: Any) -> Collator:
    """Tensors `[B, T]`, filled up on the right."""
    pad = pad_token(tokenizer)

    def collate(rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return collate


def packed_rows(rows: list[TokenRow]) -> dict[str, torch.Tensor]:
    """Tensors `[1, T]` of all rows one after the other.

    Positions begin anew with every row, from which transformers makes a mask of blocks: no token sees another row. The
    first token of a row is no label, since what stands before it is another row's end.
    """
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
    positions = [at for row in rows for at in range(len(row["input_ids"]))]
    named = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values]) for name, values in named.items()}
